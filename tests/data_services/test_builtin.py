import ast
import warnings

import pytest

from data_services import builtin


def definition(source: str) -> builtin.Documented:
    node = ast.parse(source).body[0]
    assert isinstance(node, builtin.Documented)
    return node


def without_docstring(source: str) -> str:
    return builtin.source_without_docstrings([line.encode() for line in source.split("\n")], definition(source))


def bare_tree(source: str, docstrings_out: bool) -> str:
    """The syntax tree less its docstrings; strings inside keep their text but for white space."""
    node = definition(source)
    for inner in ast.walk(node) if docstrings_out else ():
        if isinstance(inner, builtin.Documented) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Expr(ast.Constant(...))]
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str | bytes):
            child.value = "".join(str(child.value).split())
    return ast.dump(node)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(x):\n    """Doc."""\n    return x', "def f(x):\n    return x"),
        ('def f(x):\n    """Doc.\n\n    More.\n    """\n\n\n    return x', "def f(x):\n    return x"),
        ('def f(x): "doc"; return x', "def f(x): return x"),
        ('def f(x):\n    "doc"; return x', "def f(x):\n    return x"),
        ('def f(x):\n    "doc"  # why\n    return x', "def f(x):\n    # why\n    return x"),
        ('def f(x):\n    ("do"\n     "c")\n    return x', "def f(x):\n    return x"),
        ('class E(Exception):\n    """Doc."""', "class E(Exception):\n    ..."),
        ('class E(Exception): "doc"', "class E(Exception): ..."),
        ('@a(\n    1)\n@b\ndef f():\n    "doc"\n    pass', "@a(\n    1)\n@b\ndef f():\n    pass"),
        ('def f(x="日本"): "é"; return "ü"', 'def f(x="日本"): return "ü"'),
        (
            'class C:\n    """Doc."""\n    def f(self):\n        """Inner."""\n    def g(self):\n        "x"; return 1',
            "class C:\n    def f(self):\n        ...\n    def g(self):\n        return 1",
        ),
        ('async def f(\n    x,\n):\n    "doc"\n    await x', "async def f(\n    x,\n):\n    await x"),
    ],
)
def test_the_docstring_goes_and_nothing_else(source, expected):
    assert without_docstring(source) == expected


def test_a_sample_of_the_corpus_parses_to_the_same_trees_without_the_docstrings():
    by_name = {pair.name: pair for pairs in builtin.stdlib_code().values() for pair in pairs}
    checked = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, path in builtin.stdlib_files()[::25]:
            pairs = [pair for pair in by_name.values() if pair.module == module]
            if not pairs:
                continue
            text = path.read_text("utf-8")
            nodes = {
                f"{module}.{name}:{node.lineno}": node
                for name, node in ((n, d) for d, n in builtin._definitions(ast.parse(text), ""))
            }
            for pair in pairs:
                node = nodes[pair.name]
                lines = text.split("\n")
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                own = "\n".join(line.removeprefix(" " * node.col_offset) for line in lines[first - 1 : node.end_lineno])
                assert bare_tree(pair.positive, False) == bare_tree(own, True), pair.name
                checked += 1
    assert checked > 100


def test_the_corpus_has_its_size_and_its_shares():
    counts = {split: len(pairs) for split, pairs in builtin.stdlib_code().items()}
    total = sum(counts.values())
    assert 6_000 < total < 10_000
    assert 0.08 < counts["heldout"] / total < 0.2
    assert 0.04 < counts["validation"] / total < 0.14


def test_modules_and_texts_are_on_one_side_only():
    splits = builtin.stdlib_code()
    for one in builtin.SPLITS:
        for other in builtin.SPLITS[: builtin.SPLITS.index(one)]:
            assert not {p.module for p in splits[one]} & {p.module for p in splits[other]}
            assert not {p.positive for p in splits[one]} & {p.positive for p in splits[other]}


def test_one_module_in_seven_is_held_out_and_one_in_ten_of_the_rest_validates():
    modules = [f"m{i:03}" for i in range(140)]
    splits = builtin.split_modules(modules[::-1])
    assert sorted(name for names in splits.values() for name in names) == modules
    assert {split: len(names) for split, names in splits.items()} == {
        "heldout": 20,
        "validation": 12,
        "train": 108,
    }


def test_pairs_come_sorted_with_unique_names_and_one_line_queries():
    for pairs in builtin.stdlib_code().values():
        assert [p.module for p in pairs] == sorted(p.module for p in pairs)
        assert len({p.name for p in pairs}) == len(pairs)
        assert all(p.query == " ".join(p.query.split()) for p in pairs)
        assert not any(".test." in p.module or "site-packages" in p.module for p in pairs)


def test_short_docstrings_nested_functions_and_unreadable_files_are_left_out(tmp_path):
    good = tmp_path / "good.py"
    good.write_text(
        'class A:\n    """Too short."""\n    def f(self):\n        """Says hello to\n        you.\n\n        More."""\n'
        '        def g():\n            """Nested in a function, so not taken."""\n        return g\n'
        'if True:\n    def h():\n        """Defined under a condition here."""\n        return 1\n'
    )
    pairs = list(builtin.module_pairs("good", good))
    assert [(p.name, p.query) for p in pairs] == [
        ("good.A.f:3", "Says hello to you."),
        ("good.h:12", "Defined under a condition here."),
    ]
    assert pairs[1].positive == "def h():\n    return 1"
    bad = tmp_path / "bad.py"
    bad.write_text("print 'two'\n")
    latin = tmp_path / "latin.py"
    latin.write_bytes(b'x = "\xe9"\n')
    assert not list(builtin.module_pairs("bad", bad))
    assert not list(builtin.module_pairs("latin", latin))


def test_the_stamp_is_stable_and_follows_the_files(tmp_path, monkeypatch):
    assert builtin.stdlib_stamp() == builtin.stdlib_stamp()
    file = tmp_path / "m.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(builtin, "stdlib_files", lambda: (("m", file),))
    before = builtin.stdlib_stamp()
    file.write_text("x = 11\n")
    assert builtin.stdlib_stamp() != before
