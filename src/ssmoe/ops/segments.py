"""Where documents begin and where padding lies in a batch of rows: one object for every op and layer."""

from typing import NamedTuple

from torch import Tensor


class Segments(NamedTuple):
    """Document structure of a batch; slicing both tensors along l is chunking.

    ids: (b, l) int32, the document's number within its row, -1 for padding.
    starts: (b, l) bool, true where the state is reset before this position. A first real position that is
        not a start continues the initial state. Starts on padding have no effect.
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

    def slice(self, begin: int, end: int) -> "Segments":
        """The columns begin to end."""
        return Segments(self.ids[:, begin:end], self.starts[:, begin:end])
