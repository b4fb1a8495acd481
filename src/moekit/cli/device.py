"""The device named on the command line, tried and made ready before any work begins."""

from moekit.cli.console import say
from moekit.config.errors import InputError


def prepare_device(name: str) -> None:
    """Raise an InputError unless tensors can be made on the device `name`. Says so if code for it must be compiled."""
    import torch  # noqa: PLC0415 - torch comes late

    from moekit.kernels.library import pending  # noqa: PLC0415

    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"`device`: {name} cannot be used: {reason}", _hint(torch.cuda.device_count())) from None
    if torch.device(name).type == "cpu" and pending():
        say("compiling kernels for this machine, which is done once and takes some ten seconds")


def _hint(n_cuda: int) -> str:
    known = ["cpu", *(f"cuda:{index}" for index in range(n_cuda))]
    return f"devices here: {', '.join(known)}"
