import pytest

from ssmoe.cli.extras import require


def test_a_missing_package_names_the_remedy():
    require("json", "none")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ssmoe\[plots\]'"):
        require("not_a_package", "plots")
