"""Where documents begin and where padding lies in a batch of rows: one object for every op and layer."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Side = Literal["left", "right"]
T = TypeVar("T")


class Segments(NamedTuple):
    """Document structure of a batch; slicing both tensors along l is chunking.

    ids: (b, l) int32, the document's number within its row, -1 for padding.
    starts: (b, l) bool, true where the state is reset before this position. A first real position that is
        not a start continues the initial state. Starts on padding have no effect.

    `ragged`, `padded`, `packed` and `opened_by` make one from what is usually at hand.
    """

    ids: Tensor
    starts: Tensor

    @property
    def real(self) -> Tensor:
        """(b, l) bool, false on padding."""
        return self.ids >= 0

    @property
    def resets(self) -> Tensor:
        """(b, l) bool, starts of real positions."""
        return self.starts & self.real

    def derived(self, name: str, make: Callable[[], T]) -> T:
        """What `make` makes of these segments; `noted` ones keep it."""
        del name
        return make()

    def noted(self) -> "Segments":
        """The same for one pass through a model, whose layers ask for the same things again and again."""
        return _Noted(self.ids, self.starts)

    def slice(self, begin: int, end: int) -> "Segments":
        """The columns begin to end."""
        return Segments(self.ids[:, begin:end], self.starts[:, begin:end])

    def check(self) -> "Segments":
        """Itself. Raises ValueError where ids and starts contradict each other; reads every value."""
        if self.ids.ndim != 2 or self.ids.shape != self.starts.shape:
            raise ValueError(
                f"segments have ids {tuple(self.ids.shape)} and starts {tuple(self.starts.shape)}: "
                "both must be (batch, length)"
            )
        if self.ids.dtype != torch.int32 or self.starts.dtype != torch.bool:
            raise ValueError(
                f"segments have ids of {self.ids.dtype} and starts of {self.starts.dtype}: "
                "make them int32 and bool"
            )
        before = _previous_real(self.ids)
        changes = self.real & (before >= 0) & (before != self.ids)
        if bool((changes & ~self.starts).any()):
            row, column = (int(i) for i in (changes & ~self.starts).nonzero()[0])
            raise ValueError(
                f"row {row} changes document at position {column} without a start there: the state would "
                "cross documents; set starts, or give both positions the same id"
            )
        if bool((self.resets & (before == self.ids)).any()):
            row, column = (int(i) for i in (self.resets & (before == self.ids)).nonzero()[0])
            raise ValueError(
                f"row {row} has a start at position {column} inside document {int(self.ids[row, column])}: "
                "give what follows an id of its own, or clear the start"
            )
        return self

    @staticmethod
    def ragged(
        lengths: Tensor | Sequence[int],
        *,
        length: int | None = None,
        side: Side = "right",
        device: torch.device | str | None = None,
    ) -> "Segments":
        """One document a row, `lengths` (b,) real tokens each, padding on `side` up to `length`.

        `length` None is the longest. Rows continue the initial state. Raises ValueError for a length below 0
        or above `length`.
        """
        counts = torch.as_tensor(lengths, device=device)
        if counts.ndim != 1 or counts.numel() == 0 or counts.is_floating_point():
            raise ValueError(f"lengths must be a list of whole numbers, one a row, got {lengths}")
        length = int(counts.max()) if length is None else length
        if int(counts.min()) < 0 or int(counts.max()) > length:
            raise ValueError(f"lengths {counts.tolist()} do not lie between 0 and the row length {length}")
        column = torch.arange(length, device=counts.device)
        counts = counts.unsqueeze(1)
        real = column < counts if side == "right" else column >= length - counts
        return Segments(real.to(torch.int32) - 1, torch.zeros_like(real))

    @staticmethod
    def padded(mask: Tensor) -> "Segments":
        """One document a row from a padding mask (b, l), true or 1 on real tokens, padding on either side.

        Rows continue the initial state. Raises ValueError for other values and for padding between tokens.
        """
        if mask.ndim != 2 or mask.is_floating_point() or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"the padding mask must be (batch, length) of true and false, got {tuple(mask.shape)} of "
                f"{mask.dtype}"
            )
        real = mask.to(torch.bool)
        runs = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
        if bool((runs > 1).any()):
            row = int((runs > 1).nonzero()[0])
            raise ValueError(
                f"row {row} of the padding mask has padding between its tokens: pad at one end, "
                "or use Segments.packed for several documents"
            )
        return Segments(real.to(torch.int32) - 1, torch.zeros_like(real))

    @staticmethod
    def packed(
        lengths: Sequence[Sequence[int]],
        *,
        length: int | None = None,
        continues: bool = False,
        device: torch.device | str | None = None,
    ) -> "Segments":
        """Rows of documents of the given lengths end to end, padded at the right up to `length`.

        continues: the first document of each row goes on from the initial state. Raises ValueError for a
        document without tokens or a row above `length`.
        """
        totals = [sum(row) for row in lengths]
        length = max(totals, default=0) if length is None else length
        if not lengths or any(n < 1 for row in lengths for n in row):
            raise ValueError(f"every document needs at least one token, got lengths {lengths}")
        if max(totals) > length:
            raise ValueError(
                f"row {totals.index(max(totals))} holds {max(totals)} tokens, more than {length}"
            )
        ids = torch.full((len(lengths), length), -1, dtype=torch.int32)
        starts = torch.zeros(len(lengths), length, dtype=torch.bool)
        for row, documents in enumerate(lengths):
            begin = 0
            for number, n in enumerate(documents):
                ids[row, begin : begin + n] = number
                starts[row, begin] = number > 0 or not continues
                begin += n
        return Segments(ids.to(device), starts.to(device))

    @staticmethod
    def opened_by(token: int, ids: Tensor, *, mask: Tensor | None = None) -> "Segments":
        """Documents that `token` opens, as in our training rows; a row that begins inside one continues it.

        ids: (b, l) token ids. mask: (b, l), true or 1 on real tokens, where `token` also serves as padding.
        """
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"the mask has shape {tuple(mask.shape)} and the ids {tuple(ids.shape)}")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        starts = (ids == token) & real
        number = starts.to(torch.int32).cumsum(1, dtype=torch.int32)
        # documents count from 0 whether or not the row opens with a start
        first = torch.where(real, number, torch.full_like(number, 2**30)).amin(1, keepdim=True)
        return Segments((number - first).masked_fill(~real, -1), starts)


class _Noted(Segments):
    def derived(self, name: str, make: Callable[[], T]) -> T:
        if name not in self.__dict__:
            self.__dict__[name] = make()
        return self.__dict__[name]


def _previous_real(ids: Tensor) -> Tensor:
    """(b, l): the id of the real position before each one, -1 where there is none."""
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(ids >= 0, column, torch.full_like(column, -1)).cummax(1).values
    last = torch.cat((torch.full_like(last[:, :1], -1), last[:, :-1]), dim=1)
    return ids.gather(1, last.clamp(min=0)).masked_fill(last < 0, -1)
