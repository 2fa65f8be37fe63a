# shellcheck shell=bash
# Flags of XLA, NCCL and libtpu; this file is the only place that has them. Source it in bash, with the kind of device:
#   source launch/xla_flags.sh gpu
#   source launch/xla_flags.sh tpu
# What is already in XLA_FLAGS or LIBTPU_INIT_ARGS comes last and therefore wins, so a flag can be tried without an edit:
#   XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false sbatch launch/slurm.sbatch ...
# An unknown flag ends the process at once; flags come and go with versions of jaxlib and libtpu.
case "${1-}" in
gpu)
  flags=(
    # Start a collective as soon as its operands are ready and wait for it as late as possible: the gather of the next
    # layer's parameters runs under this layer's matmuls.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # Move the collectives of one iteration of the scan over layers into the one before or after. Without these three
    # nothing overlaps across iterations, and almost all of the model is inside the loop.
    --xla_gpu_enable_pipelined_all_gather=true
    --xla_gpu_enable_pipelined_reduce_scatter=true
    --xla_gpu_enable_pipelined_all_reduce=true
    # Unroll two iterations of that loop with separate buffers, so that pipelining needs no copies.
    --xla_gpu_enable_while_loop_double_buffering=true
    # One call for a whole layer instead of one per parameter: a layer of width 3968 is 378 MB in bf16, so 1 GiB holds
    # its gather and 512 MiB the scatter of its gradients.
    --xla_gpu_all_gather_combine_threshold_bytes=1073741824
    --xla_gpu_reduce_scatter_combine_threshold_bytes=536870912
    # No CUDA graphs: they keep collectives from overlapping and cost memory, and a training step is long enough for
    # launches not to matter.
    --xla_gpu_enable_command_buffer=
  )
  export XLA_FLAGS="${flags[*]} ${XLA_FLAGS-}"
  # Share of the GPU's memory that JAX takes at the start; the rest is for NCCL and the CUDA context.
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION-0.92}"
  # NCCL names the host and the network card when a link fails; it prints nothing otherwise.
  export NCCL_DEBUG="${NCCL_DEBUG-WARN}"
  ;;
tpu)
  flags=(
    # Gathers run beside the matmuls that need them. libtpu chooses how to fuse the two for each generation, and refuses
    # xla_tpu_enable_async_collective_fusion=true on all but v5e.
    --xla_enable_async_all_gather=true
    # The tensor core computes while the interconnect carries a collective.
    --xla_tpu_overlap_compute_collective_tc=true
    # Point-to-point exchanges between neighbors run beside the computation too.
    --xla_enable_async_collective_permute=true
    # Reduce gradients over data-parallel axes during the backward pass, even if parameters differ in size.
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
  )
  export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS-}"
  ;;
*)
  echo "launch/xla_flags.sh: expected gpu or tpu, got '${1-}': source launch/xla_flags.sh gpu" >&2
  exit 2
  ;;
esac
unset flags
