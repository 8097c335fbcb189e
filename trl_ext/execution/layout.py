"""
The plan: which token of a padded batch is computed in which slot of which row.

Sequences that begin alike form a tree: tokens they share are computed once, and each branch continues from there with
the positions it had. A row of the layout holds one or several trees, written depth first. In that order one number per
token says everything the attention mask has to know: a token is visible to itself and to the slots after it up to the
end of its subtree (`subtree_end`), because those are exactly its continuations.

Unlike the layout published with the method (https://huggingface.co/papers/2410.20305), no branch starts with a copy of
the last prompt token: the forward picks the hidden state that predicts each scored token itself, and several branches
may be predicted from the same one. What predicts nothing (padding, and the last token of each sequence) is not
computed at all.

Letters: N sequences padded to L columns (the canonical batch); R rows of T slots (the layout). Everything here is
NumPy on the host; it knows lengths and token ids, no model and no device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# A sequence joins the tree of its neighbour if they share at least this part of the shorter of the two. The first rule
# saves every token it can; the second keeps apart what shares little, so that rows can be filled more freely.
LINK_RULES = (0.0, 0.25)


@dataclass(frozen=True)
class Layout:
    """
    Where each token of a canonical batch `(N, L)` is computed.

    Attributes:
        source (`np.ndarray` of shape `(R, T)`, int64):
            Flat index into `(N, L)` of the token in each slot, -1 in empty slots.
        subtree_end (`np.ndarray` of shape `(R, T)`, int64):
            One past the last slot of the row that may look at this one. An empty slot is seen by itself only.
        depth (`np.ndarray` of shape `(R, T)`, int64):
            How many tokens of its sequence come before the one in each slot; 0 in empty slots.
        slots (`np.ndarray` of shape `(N, L)`, int64):
            Flat index into `(R, T)` of the slot that computes each canonical token, -1 where none does.
    """

    source: np.ndarray
    subtree_end: np.ndarray
    depth: np.ndarray
    slots: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.source.shape[0]

    @property
    def shares(self) -> bool:
        """Whether any slot computes a token of more than one sequence."""
        used = self.slots[self.slots >= 0]
        return len(np.unique(used)) < len(used)

    @property
    def row_length(self) -> int:
        return self.source.shape[1]


@dataclass(frozen=True)
class _Tree:
    """Consecutive sequences, of the sorted order, that share slots."""

    first: int  # place of the first of them in the order
    shared: tuple[int, ...]  # leading tokens each sequence takes over from the one before it, 0 for the first
    num_slots: int


def plan_layout(
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    scored: np.ndarray,
    position_ids: np.ndarray | None = None,
    *,
    keep_unscored: bool = False,
    multiple_of: int = 1,
    longest_row: int | None = None,
    cost: Callable[[int, int], float] | None,
) -> Layout | None:
    """
    The cheapest layout for a batch in which every distinct token is computed as few times as pays.

    Args:
        input_ids (`np.ndarray` of shape `(N, L)`, integer): token ids.
        attention_mask (`np.ndarray` of shape `(N, L)`): non-zero on tokens. Padding may be on either side.
        scored (`np.ndarray` of shape `(N, L)`, bool): tokens whose log-probability is wanted.
        position_ids (`np.ndarray` of shape `(N, L)`, *optional*): tokens are shared only at equal positions. Defaults
            to the columns.
        keep_unscored (`bool`): also compute tokens that lead to no scored one (for sums over all tokens, such as a
            router's balancing loss).
        multiple_of (`int`): round T up to a multiple of this, so that compiled kernels see few different shapes.
        longest_row (`int`, *optional*): most slots of a row, unless a single sequence is longer.
        cost (`Callable`, *optional*): `cost(R, T)` of running R rows of T slots, in any unit. `None` for attention
            that looks at nothing but what a token may see, so that rows cost nothing: all tokens are in one row,
            and each distinct one is computed once.

    Returns:
        [`Layout`], or `None` if no token has to be computed.

    Raises:
        ValueError: a sequence with holes in its mask, or a scored token whose predecessor is masked.
    """
    num_sequences, num_columns = input_ids.shape
    attention_mask = attention_mask.astype(bool)
    if (np.diff(attention_mask, axis=1, prepend=False, append=False).sum(axis=1) > 2).any():
        raise ValueError("the attention mask has holes: tokens, then padding, then tokens again")
    scored = scored.copy()
    scored[:, 0] = False  # nothing predicts the first column; TRL's shifted labels leave it out as well
    predecessor = np.zeros_like(attention_mask)
    predecessor[:, 1:] = attention_mask[:, :-1]
    if (scored & ~predecessor).any():
        raise ValueError("a scored token follows padding, so that nothing predicts it")
    needed = attention_mask
    if not keep_unscored:
        leads_on = np.zeros_like(scored)  # a later token of the sequence is scored
        leads_on[:, :-1] = np.logical_or.accumulate(scored[:, :0:-1], axis=1)[:, ::-1]
        needed = attention_mask & leads_on
    if not needed.any():
        return None

    columns = [np.flatnonzero(row) for row in needed]
    positions = position_ids if position_ids is not None else np.broadcast_to(np.arange(num_columns), input_ids.shape)
    placed = (input_ids.astype(np.int64) << 32) + positions  # one number for a token and its position
    as_bytes = placed.astype(">i8")  # which sort like the numbers; an equal beginning makes neighbours
    tokens = [row[own] for row, own in zip(placed, columns, strict=True)]
    order = sorted(
        (n for n in range(num_sequences) if len(tokens[n])),
        key=lambda n: as_bytes[n, columns[n]].tobytes(),
    )
    lengths = [len(tokens[n]) for n in order]
    common = [0] + [_common_prefix(tokens[a], tokens[b]) for a, b in zip(order, order[1:], strict=False)]
    whole_trees = {rule: _grow_trees(lengths, common, sum(lengths), rule) for rule in LINK_RULES}

    if cost is None:
        trees = whole_trees[LINK_RULES[0]]
        num_slots = -(-sum(tree.num_slots for tree in trees) // multiple_of) * multiple_of
        return _write(trees, [list(range(len(trees)))], num_slots, order=order, columns=columns, shape=input_ids.shape)
    best, best_cost = None, float("inf")
    for capacity in _capacities(lengths, whole_trees[LINK_RULES[0]], longest_row):
        for least_shared, trees in whole_trees.items():
            if capacity < max(tree.num_slots for tree in trees):
                trees = _grow_trees(lengths, common, capacity, least_shared)
            rows = _pack(trees, capacity)
            row_length = max(sum(trees[t].num_slots for t in row) for row in rows)
            row_length = -(-row_length // multiple_of) * multiple_of
            price = cost(len(rows), row_length)
            if price < best_cost:
                best, best_cost = (trees, rows, row_length), price
    return _write(*best, order=order, columns=columns, shape=input_ids.shape)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _capacities(lengths: list[int], whole_trees: list[_Tree], longest_row: int | None) -> list[int]:
    """Row lengths worth trying: the longest sequence, the largest tree, and the total over 1, 2, 3, 4, 6... rows."""
    trees = [tree.num_slots for tree in whole_trees]
    longest, total = max(lengths), sum(trees)
    capacities = {longest, max(trees)}
    num_rows = 1
    while num_rows <= len(lengths) and total // num_rows >= longest // 2:
        for slack in (1.0, 1.08):  # room for a packing that cannot fill every row
            capacities.add(max(longest, int(total / num_rows * slack) + 1))
        num_rows = num_rows + 1 if num_rows < 4 else num_rows * 3 // 2
    if longest_row is not None:
        capacities = {min(capacity, max(longest_row, longest)) for capacity in capacities}
    return sorted(capacities)


def _grow_trees(lengths: list[int], common: list[int], capacity: int, least_shared: float) -> list[_Tree]:
    """Join neighbours into trees of at most `capacity` slots; after a full tree the next one starts afresh."""
    trees, shared, num_slots = [], [], 0
    for i, length in enumerate(lengths):
        joins = bool(shared) and common[i] > 0 and common[i] >= least_shared * min(length, lengths[i - 1])
        if joins and num_slots + length - common[i] <= capacity:
            shared.append(common[i])
            num_slots += length - common[i]
            continue
        if shared:
            trees.append(_Tree(i - len(shared), tuple(shared), num_slots))
        shared, num_slots = [0], length
    trees.append(_Tree(len(lengths) - len(shared), tuple(shared), num_slots))
    return trees


def _pack(trees: list[_Tree], capacity: int) -> list[list[int]]:
    """Indices of the trees in each row: first fit, longest first."""
    rows, room = [], []
    for t in sorted(range(len(trees)), key=lambda t: -trees[t].num_slots):
        size = trees[t].num_slots
        row = next((r for r, free in enumerate(room) if free >= size), None)
        if row is None:
            rows.append([])
            room.append(max(capacity, size))
            row = len(rows) - 1
        rows[row].append(t)
        room[row] -= size
    return rows


def _write(
    trees: list[_Tree],
    rows: list[list[int]],
    row_length: int,
    *,
    order: list[int],
    columns: list[np.ndarray],
    shape: tuple[int, int],
) -> Layout:
    source = np.full((len(rows), row_length), -1, dtype=np.int64)
    subtree_end = np.tile(np.arange(1, row_length + 1), (len(rows), 1))
    depth = np.zeros_like(source)
    slots = np.full(shape, -1, dtype=np.int64)
    for r, row in enumerate(rows):
        cursor = 0
        for t in row:
            path = np.empty(0, dtype=np.int64)  # slots, within the row, of the sequence written last
            for i, shared in enumerate(trees[t].shared):
                n = order[trees[t].first + i]
                own = np.arange(cursor, cursor + len(columns[n]) - shared)
                subtree_end[r, path[shared:]] = cursor  # what the next sequence does not share ends here
                path = np.concatenate([path[:shared], own])
                source[r, own] = n * shape[1] + columns[n][shared:]
                depth[r, own] = np.arange(shared, len(columns[n]))
                slots[n, columns[n]] = r * row_length + path
                cursor += len(own)
            subtree_end[r, path] = cursor
    return Layout(source, subtree_end, depth, slots)
