import sys

import pytest

from data_services.imports import import_object
from data_services.schema import UsageError


def test_an_import_path_gives_its_object_and_a_wrong_one_names_the_key_and_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "my_objective.py").write_text("class Mine: pass\nwords = 'x'\n")
    (tmp_path / "needs_more.py").write_text("import not_there\n")
    (tmp_path / "needs_name.py").write_text("from my_objective import Yours\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_object("my_objective:Mine", "objective.path").__name__ == "Mine"
    for path, told in [
        ("my_objective", "is 'my_objective': write an import path as package.module:Name"),
        ("my_objective:Mime", ": module 'my_objective' has no 'Mime'; did you mean Mine?"),
        ("my_objective:words", ": 'my_objective:words' is a str, not a function or class"),
        ("absent_module:X", ": no module 'absent_module'"),
        ("needs_more:X", ": no module 'not_there', needed for 'needs_more:X'"),
        ("needs_name:X", ": can't import 'needs_name': cannot import name 'Yours'"),
    ]:
        with pytest.raises(UsageError) as caught:
            import_object(path, "objective.path")
        assert str(caught.value).startswith("objective.path")
        assert told in str(caught.value)
