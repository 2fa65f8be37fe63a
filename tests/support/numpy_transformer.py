"""The transformer in float64, read from the paper once more: no line is shared with the package.

Ramesh et al. 2021, sections 2.2 and 2.3 and appendix B.1, with the blocks of Child et al. 2019 that they name. One
sequence and one head at a time, masks position by position; only the names of the parameters are the package's.
"""

import numpy as np


def read(params, caption, image):
    """What one caption (a list of its tokens) and one image (its tokens) give.

    Returns: text logits [T, ids], image logits [I, codes], and the loss.
    """
    p = {name: np.asarray(a, np.float64) for name, a in params.items() if name != "blocks"}
    text_len, grid = len(p["text_position"]), len(p["row_position"])
    words = len(p["text_embedding"]) - text_len  # the rest are padding vectors, one for each text position
    ids = [words, *caption][:text_len]  # position 0 never pads: its padding vector says where text starts
    ids += range(words + len(ids), words + text_len)
    start_of_image = len(p["image_embedding"]) - 1
    x = [p["text_embedding"][token] + p["text_position"][i] for i, token in enumerate(ids)]
    for i, code in enumerate([start_of_image, *image[:-1]]):
        x.append(p["image_embedding"][code] + p["row_position"][i // grid] + p["column_position"][i % grid])
    x, layers = np.array(x), len(params["blocks"]["up"])
    for number in range(1, layers + 1):
        kind = "conv" if number == layers else "column" if (number - 2) % 4 == 0 else "row"
        x = layer({n: np.asarray(a[number - 1], np.float64) for n, a in params["blocks"].items()}, x, kind, grid)
    x = norm(x, p["norm_gain"], p["norm_bias"])
    text, codes = x[:text_len] @ p["text_head"], x[text_len:] @ p["image_head"]
    text_nats = [nats(text[i], ids[i + 1]) for i in range(text_len - 1)]  # padding counts
    image_nats = [nats(row, code) for row, code in zip(codes, image, strict=True)]
    return text, codes, np.mean(text_nats) / 8 + 7 * np.mean(image_nats) / 8


def layer(b, x, kind, grid):
    h, text_len = norm(x, b["norm1_gain"], b["norm1_bias"]), len(x) - grid * grid
    mask = np.array([[sees(kind, q, k, text_len, grid) for k in range(len(x))] for q in range(len(x))])
    x = x + b["out_bias"]
    for head, out in enumerate(b["out"]):
        q, k, v = (h @ b["qkv"][:, part, head] + b["qkv_bias"][part, head] for part in range(3))
        weights = np.where(mask, np.exp(q @ k.T / np.sqrt(q.shape[1])), 0)  # one softmax over text and image
        x = x + weights / weights.sum(1, keepdims=True) @ v @ out
    z = norm(x, b["norm2_gain"], b["norm2_bias"]) @ b["up"] + b["up_bias"]
    return x + z / (1 + np.exp(-1.702 * z)) @ b["down"] + b["down_bias"]


def sees(kind, query, key, text_len, grid):
    back = query - key
    if back < 0 or key < text_len:
        return back >= 0
    if kind == "conv":
        return any(back == up * grid + left for up in range(6) for left in range(-5, 6))
    return back <= grid if kind == "row" else back % grid == 0


def norm(x, gain, bias):
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * gain + bias


def nats(logits, target):
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
