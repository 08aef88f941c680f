"""Keys and values of running requests, in blocks of a fixed number of tokens.

The memory: `block_pool` says which blocks are whose. A request's block table lists its blocks in
order of position.
"""

import torch


class PagedKv:
    """Paged keys and values of all layers.

    Args:
        num_layers: Layers.
        num_blocks: Blocks in each layer.
        block_tokens: Tokens in a block.
        num_kv_heads: Key/value heads.
        head_dim: Elements of a head.
        dtype: The activations' dtype.
        device: Where it lives.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_tokens, num_kv_heads, head_dim)
        self._blocks = torch.empty(shape, dtype=dtype, device=device)

    def write(
        self, layer: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Stores new tokens.

        Args:
            layer: The layer.
            positions: int64 (T,): block number * block_tokens + offset in the block.
            keys: (T, num_kv_heads, head_dim).
            values: As `keys`.
        """
        flat = self._blocks[layer].flatten(1, 2)
        flat[0].index_copy_(0, positions, keys)
        flat[1].index_copy_(0, positions, values)

    def gather(
        self, layer: int, block_table: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of one request's first `num_tokens` tokens, in order.

        Returns:
            Two tensors (num_tokens, num_kv_heads, head_dim).
        """
        # A prompt's blocks are there from the start; what comes after this chunk is empty.
        filled = block_table[: -(-num_tokens // self._blocks.shape[3])]
        blocks = self._blocks[layer].index_select(1, filled).flatten(1, 2)
        return blocks[0, :num_tokens], blocks[1, :num_tokens]
