"""Speed and memory of programs whose cost is known."""

import time

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer.measure import cost


def test_speed_counts_images_and_waits_for_the_result():
  """A program that sleeps 20 ms for 4 images cannot do more than 200 a
  second, however busy the machine is."""

  def program():
    time.sleep(0.02)
    return jnp.ones(3)

  (speed,) = cost.measure_forward([program], images=4, repeats=3)
  assert 0 < speed.low <= speed.median <= speed.high <= 200
  assert speed.repeats == 3


def test_programs_are_warmed_and_then_take_turns():
  """Both then meet the same moments of a machine that has other work."""
  calls = []
  programs = [lambda: calls.append("a"), lambda: calls.append("b")]
  speeds = cost.measure_forward(programs, images=1, repeats=5)
  assert "".join(calls) == "aabb" + 5 * "ab"
  assert len(speeds) == 2


def test_peak_memory_holds_arguments_results_and_what_lies_between():
  x = jnp.ones((256, 1024))
  small = jax.jit(lambda x: x.sum()).lower(x).compile()
  large = jax.jit(lambda x: jnp.linalg.inv(x @ x.T)).lower(x).compile()
  assert cost.peak_memory(small) >= x.nbytes
  assert cost.peak_memory(large) >= x.nbytes + 256 * 256 * 4
  # Deterministic: it is the compiler's plan.
  again = jax.jit(lambda x: x.sum()).lower(x).compile()
  assert cost.peak_memory(again) == cost.peak_memory(small)


def test_allocated_peak_is_bytes_or_unknown():
  found = cost.allocated_peak(jax.devices()[0])
  assert found is None or found > 0


@pytest.mark.parametrize(("images", "repeats"), [(0, 1), (1, 0)])
def test_refuses(images, repeats):
  with pytest.raises(ValueError, match="1 or more"):
    cost.measure_forward([lambda: 0], images, repeats)
