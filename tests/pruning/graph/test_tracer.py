import torch
from helpers.axis_notation import reasons, spell, trace_function


def test_operation_without_rule_freezes_its_axes() -> None:
    trace = trace_function(lambda m: torch.linalg.inv_ex(m.a)[0] + m.b, a=(4, 4), b=(4, 4))
    assert spell(trace) == "4! 4!, 4! 4!"
    assert trace.unknown == {"linalg_inv_ex": 1}
    assert reasons(trace) == {"there is no rule for the operation linalg_inv_ex"}
