"""A probe of the installed MuJoCo: other versions let the objects of one scene slide apart."""

from __future__ import annotations

import numpy as np

from pi0rl.libero.simulation import Simulation
from pi0rl.libero.suites import official_init_states, task

# What the pinned MuJoCo gives, in metres; with 3.17 the bowl slides off the ramekin and ends 6.2 cm away.
EXPECTED_DISTANCE = 0.0145


def settle_probe() -> float:
    """Horizontal distance (m) of bowl and ramekin in libero_spatial task 5, init state 0, after settling.

    Raises:
        UserError: The installed MuJoCo is not the pinned one, or the task's model cannot be built.
    """
    scene = task("libero_spatial", 5)
    simulation = Simulation(scene)
    simulation.reset(official_init_states(scene)[0])
    bowl = simulation.data.body("akita_black_bowl_1_main").xpos
    ramekin = simulation.data.body("glazed_rim_porcelain_ramekin_1_main").xpos
    return float(np.linalg.norm((bowl - ramekin)[:2]))
