"""Two trainings that have to end at the same weights, compared within what rounding explains."""

# Adam divides a gradient by its own size, so that where terms nearly cancel a weight moves by their rounding, which is
# another on each processor. SGD moves in proportion to the gradients; clipping would hide an error in their size.
SGD = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0}


def assert_same_movement(found, expected, start, share=1e-5):
    """Flat weights `found` and `expected` differ by at most `share` of the largest movement away from `start`."""
    moved, off = (expected - start).abs().max(), (found - expected).abs().max()
    print(f"moved by {moved:.2g}, off by {off / moved:.2g} of it")
    assert moved > 1e-3
    assert off <= share * moved
