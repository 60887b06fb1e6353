"""What param_groups decides, for tests of it."""

from torch import nn

import orthdion

__all__ = ["Classifier", "Config", "decisions", "routed"]


def decisions(model, **options):
    return {d.name: d for d in orthdion.param_groups(model, **{"require_matrices": False, **options}).decisions}


def routed(model, end):
    return [
        d.settings.get("algorithm")
        for d in orthdion.param_groups(model, require_matrices=False).decisions
        if d.name.endswith(end)
    ]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)


class Config:
    def __init__(self, **said):
        self.__dict__.update(said)
