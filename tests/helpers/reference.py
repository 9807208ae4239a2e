"""Sparse attention by slow loops, to be checked by eye against DESIGN sections 2-3: one row at a time, plain
Python."""

import math

import torch


def attention_row(scores, values, n_visible, spec, theta=None, table=None, sink=-math.inf):
    """Output and kept positions of one row. scores: list of the visible keys' scores; values: `[n, D]` their
    V rows; sink: a score that is in the denominator and no key's."""
    n = n_visible
    if n == 0:
        return torch.zeros(values.shape[-1], dtype=torch.float64), []
    top = max(scores)
    exps = [math.exp(s - top) for s in scores]
    sink = math.exp(sink - top)
    weights = [e / (sum(exps) + sink) for e in exps]
    mode, capk = spec.method.mode, getattr(spec.method, "capk", False)
    sparse = spec.k > 0 and n > spec.k and mode in (0, 1) and spec.placement != "none"
    if not sparse:
        out = sum(w * v for w, v in zip(weights, values))
        return out, list(range(n))

    compared = scores if spec.placement == "pre-softmax" else weights
    if mode == 1:
        kept = sorted(sorted(range(n), key=lambda i: -compared[i])[: spec.k])
    else:
        kept = [i for i in range(n) if compared[i] > theta]
        if not kept:
            kept = [i for i in range(n) if compared[i] == max(compared)]
        if capk:
            kept = kept[-spec.k :]

    if spec.placement == "pre-softmax":
        denominator = sum(exps[i] for i in kept)
        missing = {
            "none": 0.0,
            "exact": sum(exps[i] for i in range(n) if i not in kept),
            "exp-threshold": None if theta is None else (n - len(kept)) * math.exp(theta - top),
            "offline-calibrated": table,
        }[spec.sdc]
        without_sink = denominator + spec.sdc_scale * missing
        final = {i: exps[i] / (without_sink + sink) for i in kept}
        whole = without_sink / (without_sink + sink)
    else:
        final = {i: weights[i] for i in kept}
        whole = sum(weights)
    out = sum(w * values[i] for i, w in final.items())
    if spec.vmc:  # what the sink takes was not lost
        out = out + (whole - sum(final.values())) * values.mean(dim=0)
    return out, kept


def attention(q, k, v, visible, spec, scale, theta=None, table=None, softcap=None, sinks=None):
    """q: `[B, H, Q, D]`, k and v: `[B, H_kv, N, D]`, visible: `[B, Q, N]` bool, theta and table: `[H, L]` by
    row length, sinks: `[H]`.

    Returns out `[B, H, Q, D]` float64 and kept `[B, H, Q, N]` bool.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, num_heads, q_len, _ = q.shape
    group = num_heads // k.shape[1]
    out = torch.zeros(batch, num_heads, q_len, v.shape[-1], dtype=torch.float64)
    kept = torch.zeros(batch, num_heads, q_len, k.shape[2], dtype=torch.bool)
    for b in range(batch):
        for h in range(num_heads):
            for i in range(q_len):
                keys = visible[b, i].nonzero()[:, 0]
                n = len(keys)
                scores = [float(q[b, h, i] @ k[b, h // group, j]) * scale for j in keys]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                sink = -math.inf if sinks is None else float(sinks[h])
                row_theta = None if theta is None else float(theta[h, min(n, theta.shape[1] - 1)])
                row_table = None if table is None else float(table[h, min(n, table.shape[1] - 1)])
                values = v[b, h // group, keys]
                out[b, h, i], chosen = attention_row(scores, values, n, spec, row_theta, row_table, sink)
                kept[b, h, i, keys[chosen]] = True
    return out, kept
