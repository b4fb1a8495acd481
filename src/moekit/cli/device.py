"""The device named on the command line, tried before any work begins."""

from moekit.config.errors import InputError


def check_device(name: str) -> None:
    """Raise an InputError unless tensors can be made on the device `name`."""
    import torch  # noqa: PLC0415 - torch comes late

    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"`device`: {name} cannot be used: {reason}", _hint(torch.cuda.device_count())) from None


def _hint(n_cuda: int) -> str:
    known = ["cpu", *(f"cuda:{index}" for index in range(n_cuda))]
    return f"devices here: {', '.join(known)}"
