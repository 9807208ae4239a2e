"""Blocks of query rows of an attention call, with their scores, in plain PyTorch."""

from toptheta.attention.call import AttentionCall
from toptheta.methods.base import NEG_INF, Block


class Blocks:
    """The blocks of a call, as a method sees them. Scores are float32 for any model type."""

    def __init__(self, call: AttentionCall):
        self.call = call
        batch, num_heads, q_len, head_dim = call.q.shape
        group = num_heads // call.k.shape[1]
        self._q = (call.q.float() * call.scale).view(batch, call.k.shape[1], group, q_len, head_dim)
        self._k = call.k.float()
        self._longest = call.rows.n.amax(dim=1)

    def at(self, start: int, stop: int) -> Block:
        """Rows `start` to `stop`, with their scores over the keys that any of them sees."""
        call, rows, k = self.call, self.call.rows, self._k
        batch, num_heads, q_len, head_dim = call.q.shape
        kv_len = k.shape[2]
        end = rows.end(stop, kv_len)
        q = self._q[:, :, :, start:stop].reshape(batch, k.shape[1], -1, head_dim)
        scores = (q @ k.transpose(2, 3)[..., :end]).view(batch, num_heads, stop - start, end)
        scores = call.capped(scores)
        visible = rows.visible(start, stop, kv_len)
        if visible is not None:
            scores.masked_fill_(~visible, NEG_INF)
        return Block(
            x=scores,
            row_max=scores.amax(dim=-1, keepdim=True),
            n=rows.n[:, start:stop],
            real=None if rows.real is None else rows.real[:, start:stop],
            start=start,
            budget=call.spec.k,
            q=q.view(batch, num_heads, stop - start, head_dim),
            k=k[:, :, :end],
            last=stop == q_len,
            state=call.state,
            decode=call.decode,
            longest=self._longest,
            v=call.v[:, :, :end],
            own=rows.first is not None,
            values=call.values,
            factor=None if call.factor is None else call.factor[:, :, :end],
            sinks=call.sinks,
            softcap=call.softcap,
        )
