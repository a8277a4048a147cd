"""Random graphs keep their meaning through every exact pass that is not tested so in its own file."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.passes import FuseActivations, FuseGlu, FuseNorm, FuseRope, HoistParams, MergeLinears, PassManager

from wasat.testing import InterpreterCheck, random_graph, random_program


@pytest.mark.parametrize("seed", range(30))
def test_meaning_stays(seed: int) -> None:
    program = random_program(random_graph(np.random.default_rng(seed), 60))
    check = InterpreterCheck([{"b": 1, "s": 3}, {"b": 2, "s": 4}], rtol=1e-4, atol=1e-4)
    passes = [FuseNorm(), FuseRope(), FuseActivations(), MergeLinears(), FuseGlu(), HoistParams()]
    PassManager(passes, check=check).run(program)
