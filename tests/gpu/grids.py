"""Grids of options in which every two values meet, at a fraction of the product's size."""

from itertools import combinations, product


def pairwise(**axes):
    """Dictionaries of one value an axis, in which every two values of two axes meet."""
    everything = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]

    def met(row):
        return {(a, repr(row[a]), b, repr(row[b])) for a, b in combinations(axes, 2)}

    missing, chosen = set().union(*map(met, everything)), []
    while missing:
        row = max(everything, key=lambda r: len(met(r) & missing))
        chosen.append(row)
        missing -= met(row)
    return chosen


def named(row):
    """A row as a test's name."""
    return "-".join(str(v).removeprefix("torch.") for v in row.values())
