"""The key/value cache of a batch: slot c of a row holds position c (no section in the paper).

With that one rule, attention over the cache needs no mask but "slot <= position of the query", in prefill and decoding
alike, and stale slots beyond a row's length are harmless. Rows of different lengths sit side by side; `select` drops,
repeats and reorders rows, `join` appends those of another cache.
"""

import torch


class LayerCache:
    """Keys and values of one layer, (rows, M, capacity, A) each, and the positions the next call will write."""

    def __init__(self, keys_BMCA, values_BMCA):
        self.keys_BMCA, self.values_BMCA = keys_BMCA, values_BMCA
        self.positions_BS, self.end = None, 0

    def write(self, k_BSMA, v_BSMA):
        """Store keys and values (B, S, M, A) at `positions_BS`; return all (B, M, C, A) up to the largest position."""
        rows = torch.arange(len(k_BSMA), device=k_BSMA.device)[:, None]
        self.keys_BMCA[rows, :, self.positions_BS] = k_BSMA
        self.values_BMCA[rows, :, self.positions_BS] = v_BSMA
        return self.keys_BMCA[:, :, : self.end], self.values_BMCA[:, :, : self.end]


class KVCache(list):
    """One `LayerCache` per decoder layer."""

    @classmethod
    def empty(cls, model, rows, capacity):
        """A cache for `rows` sequences of up to `capacity` positions, in the model's dtype and on its device."""
        c, device = model.config, model.lm_head.weight.device
        shape = (rows, c.num_key_value_heads, capacity, c.head_dim)
        return cls(
            LayerCache(*(torch.zeros(shape, dtype=model.dtype, device=device) for _ in "kv"))
            for _ in range(c.num_hidden_layers)
        )

    def at(self, positions_BS):
        """This cache, set to write at these positions next."""
        end = int(positions_BS.max()) + 1  # once for all layers: on a GPU this waits for the device
        for layer in self:
            layer.positions_BS, layer.end = positions_BS, end
        return self

    def select(self, rows, capacity=None):
        """A new cache of these rows (a list of indices, repeats allowed), with room for `capacity` positions."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self[0].keys_BMCA.device)

        def take(x_BMCA):
            taken = x_BMCA[index]
            if capacity is None or capacity == x_BMCA.shape[2]:
                return taken
            grown = taken.new_zeros(*taken.shape[:2], capacity, taken.shape[3])
            common = min(capacity, x_BMCA.shape[2])
            grown[:, :, :common] = taken[:, :, :common]
            return grown

        return KVCache(LayerCache(take(layer.keys_BMCA), take(layer.values_BMCA)) for layer in self)

    def join(self, other):
        """A new cache with the rows of `other`, of the same capacity, after these."""
        return KVCache(
            LayerCache(torch.cat([a.keys_BMCA, b.keys_BMCA]), torch.cat([a.values_BMCA, b.values_BMCA]))
            for a, b in zip(self, other, strict=True)
        )
