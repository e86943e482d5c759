"""Which documents are held out: decided by their content, so that order and new neighbours change nothing."""

from collections.abc import Mapping


def choose_held_out(sizes: Mapping[bytes, int], fraction: float) -> frozenset[bytes]:
    """The digests below `fraction` of their range, at least one and never all.

    `sizes` holds the bytes of each document by its digest.
    """
    if len(sizes) < 2:
        total = sum(sizes.values())
        raise ValueError(
            "the text is one document, or copies of one, so none can be held out: "
            f"add documents or cut it with data.max_document_bytes={max(4, int(total * fraction))}"
        )
    threshold = int(fraction * 2**64).to_bytes(8)
    ordered = sorted(sizes)
    num_below = sum(digest[:8] < threshold for digest in ordered)
    return frozenset(ordered[: min(max(num_below, 1), len(ordered) - 1)])
