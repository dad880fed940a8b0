"""The language model's last layer, run only where its output is read.

A denoising step reads logits at a few masked positions. Every position still gives the last layer its key and value,
but queries, output projection and MLP are needed at those positions alone.
"""

import torch
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb, eager_attention_forward


class LLaDAMedVLastDecoderLayer(LlamaDecoderLayer):
    """A `LlamaDecoderLayer` that can be told which positions' output is wanted."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        query_positions: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """As `LlamaDecoderLayer.forward`.

        Args:
            query_positions (`(batch, queries)`, *optional*): positions whose output is wanted; `None` means all.
            past_key_values (`Cache`, *optional*): what Transformers before 5.24 calls `cache`.

        Returns:
            `(batch, queries, hidden)`, or `(batch, sequence, hidden)` without `query_positions`.
        """
        cache = past_key_values if cache is None else cache
        # Masks of other kinds (a flash kernel's padding, flex's blocks) cannot be cut.
        cuttable = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4)
        if query_positions is None or not cuttable:
            output = super().forward(
                hidden_states, attention_mask, position_ids, cache, use_cache, position_embeddings, **kwargs
            )
            if query_positions is None:
                return output
            return output.gather(1, query_positions[..., None].expand(-1, -1, output.shape[-1]))
        attention = self.self_attn
        every = query_positions[..., None]  # (batch, queries, 1)
        normed = self.input_layernorm(hidden_states)
        wanted = normed.gather(1, every.expand(-1, -1, normed.shape[-1]))

        def split_heads(states):  # (batch, positions, width) -> (batch, heads, positions, head width)
            return states.view(*states.shape[:2], -1, attention.head_dim).transpose(1, 2)

        queries = split_heads(attention.q_proj(wanted))
        keys, values = split_heads(attention.k_proj(normed)), split_heads(attention.v_proj(normed))
        cos, sin = (each.expand(len(normed), -1, -1) for each in position_embeddings)
        cos_wanted, sin_wanted = (each.gather(1, every.expand(-1, -1, each.shape[-1])) for each in (cos, sin))
        queries, _ = apply_rotary_pos_emb(queries, queries, cos_wanted, sin_wanted)
        _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
        if cache is not None:
            keys, values = cache.update(keys, values, attention.layer_idx)
        if attention_mask is not None and attention_mask.shape[2] > 1:  # (batch, heads or 1, sequence, keys)
            mask = attention_mask.expand(len(normed), -1, -1, -1)
            attention_mask = mask.gather(2, every[:, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        output, _ = interface(
            attention, queries, keys, values, attention_mask,
            dropout=attention.attention_dropout if self.training else 0.0, scaling=attention.scaling,
            **kwargs,
        )  # fmt: skip
        hidden_states = hidden_states.gather(1, every.expand(-1, -1, hidden_states.shape[-1]))
        hidden_states = hidden_states + attention.o_proj(output.flatten(2))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def positions_in_rows(wanted: torch.BoolTensor) -> torch.LongTensor:
    """Positions of the True of each row of `wanted` `(batch, sequence)`, in their order, as `query_positions`.

    Returns:
        `(batch, most)`, the shorter rows filled up with positions that are not wanted; at least one column.
    """
    most = max(1, int(wanted.sum(dim=1).max()))
    return wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


__all__ = ["LLaDAMedVLastDecoderLayer", "positions_in_rows"]
