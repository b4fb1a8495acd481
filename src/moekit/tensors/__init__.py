"""The legend of shapes: one letter, one meaning, in every signature.

    B  sequences in a batch        E  routed experts              H  attention heads
    S  tokens in a sequence        K  routed experts per token    C  width of a head
    T  tokens, B * S               R  rows sent to experts, T * K V  vocabulary
    D  width of the model          F  inner width of an expert    N  groups or devices of experts

Annotations such as `Float[Tensor, "T D"]` are assertions under the test suite and cost nothing in production.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor"]
