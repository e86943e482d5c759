"""Which documents are held out: decided by their content, so that order and new neighbours change nothing."""

from collections.abc import Collection, Mapping


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


def describe_split(sizes: Mapping[bytes, int], held_out: Collection[bytes], fraction: float) -> str | None:
    """A line that tells of a split far from `fraction`, as few documents or very unequal ones bring it about.

    Far is more than three times as much of the text, and more than a tenth of it.
    """
    total = sum(sizes.values())
    share = sum(sizes[digest] for digest in held_out) / total
    if share <= max(0.1, 3 * fraction):
        return None
    return (
        f"held out: {len(held_out):,} of {len(sizes):,} documents, which are {share:.0%} of the text and not "
        f"the share of data.held_out={fraction:g}: cut documents smaller with "
        f"data.max_document_bytes={max(4, int(total * fraction))}"
    )
