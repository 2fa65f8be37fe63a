"""The processes of one job: how they find each other, agree, and end together when one of them dies or hangs.

One process of a job that waits for another one inside a collective waits for ever, so every process says now and then
where it is (`Watchdog`), whoever finds one that is gone or stuck names it, and all of them end with a status on which
the launchers start the job again. JAX's own distributed runtime does the work: meeting (`jax.distributed`), collectives
(gloo on CPUs) and the key-value store in process 0. With one process nothing here costs or does anything.
"""

from dalle_jax.distributed.agree import gather_json, stop_agreed, whole
from dalle_jax.distributed.barrier import OtherProcessFailed, SaveBarrier
from dalle_jax.distributed.initialize import add_arguments, initialise
from dalle_jax.distributed.watchdog import Watchdog

__all__ = [
    "OtherProcessFailed",
    "SaveBarrier",
    "Watchdog",
    "add_arguments",
    "gather_json",
    "initialise",
    "stop_agreed",
    "whole",
]
