"""Tables as text, Markdown and CSV."""

from dfs_jax.writing.tables import csv_table, format_table, markdown_table


def test_text():
    table = format_table([("exit1", 0.5, 12), ("ensemble", 0.12345, 3)], ("", "top1", "n"))
    assert table.splitlines() == [
        "            top1   n",
        "--------  ------  --",
        "exit1     0.5000  12",
        "ensemble  0.1235   3",
    ]
    assert format_table([], ("a", "bc")) == "a  bc\n-  --"


def test_markdown():
    rows = [("joint", "1.50", ""), ("dfs", "10.25", "b")]
    assert markdown_table(rows, ("", "time", "x")).splitlines() == [
        "|  | time | x |",
        "| --- | --- | --- |",
        "| joint | 1.50 |  |",
        "| dfs | 10.25 | b |",
    ]
    assert markdown_table(rows, ("", "time", "x"), aligned=True).splitlines() == [
        "|       |  time | x |",
        "| ----- | ----: | : |",
        "| joint |  1.50 |   |",
        "| dfs   | 10.25 | b |",
    ]


def test_csv_has_every_column_and_nothing_for_none():
    rows = [{"exit": 1, "top1": 0.5, "top5": None}, {"exit": "a,b", "cost": 2}]
    assert csv_table(rows) == 'exit,top1,top5,cost\n1,0.5,,\n"a,b",,,2\n'
