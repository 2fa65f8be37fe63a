"""Emu3's decoder of transformers 5.24.0 at the comparison shape: training and sampling speed on the CPU, as JSON lines.

Runs in an environment of its own, which has torch and no JAX:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0 transformers==5.24.0
    PEER/bin/python -m benchmarks.peers.peer_emu3 train_eager sample_cached

A current autoregressive image model: text and image tokens of one vocabulary through a Llama-like decoder with rotary
positions, SwiGLU and dense causal attention by torch's fused kernel. Random weights; the hidden layer of the MLP is
chosen so that it has the parameters of one four times as wide with two matrices. Training is its own loss, over every
position and the whole vocabulary, with torch's fused AdamW; `train_compiled` puts the model through torch.compile.
Sampling is its own `generate` with its cache, text ids suppressed.
"""

import torch
from transformers import Emu3ForCausalLM, Emu3TextConfig

from benchmarks.peers.process import BATCH, LEARNING_RATE, SHAPE, serve

TEXT_IDS, IMAGE_LEN = SHAPE["text_vocab"], SHAPE["grid"] ** 2


def new_model():
    width = SHAPE["width"]
    config = Emu3TextConfig(
        vocab_size=TEXT_IDS + SHAPE["image_vocab"],
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["heads"],
        max_position_embeddings=SHAPE["text_len"] + IMAGE_LEN,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,  # a text id, so that suppressing these keeps every image whole
    )
    return Emu3ForCausalLM(config)


def build(work):
    text = torch.randint(TEXT_IDS, (BATCH, SHAPE["text_len"]))
    model = new_model()
    if work == "sample_cached":
        model.eval()
        ways = dict(max_new_tokens=IMAGE_LEN, do_sample=True, use_cache=True, suppress_tokens=list(range(TEXT_IDS)))

        def sample():
            ids = model.generate(text, attention_mask=torch.ones_like(text), **ways)
            image = ids[:, SHAPE["text_len"] :]
            assert image.shape[1] == IMAGE_LEN and int(image.min()) >= TEXT_IDS

        return sample
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    image = torch.randint(TEXT_IDS, TEXT_IDS + SHAPE["image_vocab"], (BATCH, IMAGE_LEN))
    ids = torch.cat([text, image], dim=1)
    forward = torch.compile(model) if work == "train_compiled" else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        forward(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    serve(__doc__, build, lambda: {"parameters": sum(p.numel() for p in new_model().parameters())})
