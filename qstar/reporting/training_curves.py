"""Draw the curves of a training run."""

from pathlib import Path

CURVES = {
    "loss": "loss",
    "base_nll": "base NLL (nats)",
    "mixed_nll": "mixed NLL (nats)",
    "reward_mean": "mean reward (nats)",
    "mix_weight_mean": "mean mixing weight",
    "policy_loss": "policy loss (unweighted)",
}


def save_curves(log_history: list[dict[str, float]], path: str | Path) -> bool:
    """Draw the logged curves over steps as a PNG; return False if nothing was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logged = [entry for entry in log_history if "loss" in entry]
    curves = [key for key in CURVES if any(key in entry for entry in logged)]
    if not curves:
        return False
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, key in zip(axes.flat, curves):
        points = [(entry["step"], entry[key]) for entry in logged if key in entry]
        axis.plot(*zip(*points))
        axis.set_title(CURVES[key])
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
