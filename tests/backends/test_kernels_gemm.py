from __future__ import annotations

import numpy as np
import pytest
from kernel_help import assert_near, build, each_isa, run
from wasat.backends.tvm.kernels.gemm import Gemm, gemm
from wasat.backends.tvm.kernels.isa import Isa


@each_isa()
@pytest.mark.parametrize("transposed", ["", "a", "b"])
@pytest.mark.parametrize("m, n, k", [(2, 7, 5), (13, 64, 33), (29, 100, 72), (961, 40, 9)])
def test_gemm(isa: Isa, transposed: str, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(0)
    compiled = build(gemm(Gemm(isa, m, n, k, transposed, threads=2)), isa)  # type: ignore[arg-type]
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    stored = [np.ascontiguousarray(x.T) if transposed == name else x for name, x in (("a", a), ("b", b))]
    [y] = run(compiled, stored, ((m, n), "float32"))
    assert_near(y, a.astype(np.float64) @ b.astype(np.float64), 1e-6)
