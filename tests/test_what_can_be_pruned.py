"""The page of examples is what the examples give, and each of them keeps the law."""

import pytest
import torch

import paamops
from tests import what_can_be_pruned as page
from tests.test_grammar import assert_same, random_keep

ROWS = {row[0]: row[1:] for section, rows in page.EXAMPLES.items() for row in rows if "written" not in section}


def test_the_page_is_what_its_generator_writes():
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


def test_no_two_rows_are_of_the_same():
    names = [row[0] for rows in page.EXAMPLES.values() for row in rows]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("example", ROWS.values(), ids=ROWS.keys())
def test_every_row_keeps_the_law(example):
    model, x = page.make(*example)
    model, x = model.double(), torch.randn_like(x, dtype=torch.float64)
    channels = paamops.trace(model, x)
    for share in (0.0, 0.5):
        keep = random_keep(channels, share)
        assert_same(paamops.pack(model, channels, keep), paamops.mask(model, channels, keep), (x,))
