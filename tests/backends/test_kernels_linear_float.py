from __future__ import annotations

import numpy as np
import pytest
from kernel_help import assert_near, build, each_isa, products, run, uneven
from wasat.backends.tvm.cpu.kernels.isa import Isa
from wasat.backends.tvm.cpu.kernels.linear_float import Linear, linear
from wasat.backends.tvm.cpu.kernels.pack import pack_bias, pack_float

ROWS = (1, 2, 3, 5, 13, 29, 241, 500)


@each_isa()
@pytest.mark.parametrize("n, k, bias, dtype", [(100, 72, True, "float32"), (64, 33, False, "float16"), (7, 5, True, "float16")])
def test_linear(isa: Isa, n: int, k: int, bias: bool, dtype: str) -> None:
    rng = np.random.default_rng(0)
    compiled = build(linear(Linear(isa, n, k, dtype, bias=bias, threads=2)), isa)  # type: ignore[arg-type]
    w = uneven(rng, n, k).astype(dtype)
    b = rng.standard_normal(n).astype(np.float32)
    packed = [pack_float(w, isa, dtype), *([pack_bias(b, isa)] if bias else [])]  # type: ignore[arg-type]
    for m in ROWS:
        x = uneven(rng, m, k)
        [y] = run(compiled, [x, *packed], ((m, n), "float32"))
        assert_near(y, products(x, w.T) + (b if bias else np.zeros(n)))
