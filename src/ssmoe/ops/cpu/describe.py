"""What the CPU backend found on this machine."""

import torch


def describe() -> dict[str, str]:
    """Instruction level of the kernels and library of the matrix products, for `ssmoe doctor`."""
    return {
        "level": str(torch.ops.ssmoe.cpu_level()),
        "float32 products": str(torch.ops.ssmoe.cpu_products()),
        "threads": str(torch.get_num_threads()),
    }
