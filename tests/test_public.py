"""The public names: verbs are functions, whatever was imported before, and importing them costs nothing."""

import pkgutil
import subprocess
import sys

import resafe


def test_verbs_stay_functions_whatever_is_imported() -> None:
    """A submodule of a verb's name would take its place as soon as anything imports it."""
    modules = {module.name for module in pkgutil.iter_modules(resafe.__path__)}
    assert not modules & set(resafe.__all__)
    script = (
        "import resafe, resafe.repairing.nlsr, resafe.verbs; assert all(map(callable, "
        "(resafe.repair, resafe.compare, resafe.measure))); assert resafe.repair is resafe.verbs.repair"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there() -> None:
    for name in resafe.__all__:
        assert getattr(resafe, name) is not None
    assert set(dir(resafe)) >= set(resafe.__all__)
