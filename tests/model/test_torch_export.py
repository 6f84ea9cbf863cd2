"""torch.export: programs for other batch sizes and lengths, holes and empty rows."""

import numerics
import pytest
import torch
from heads import BACKENDS, HEADS, SAME, call_of, gradless, head, name_of
from models import holed_batch, ragged_batch
from packaging.version import Version

from mosaicbert.bert_layers import BertForMaskedLM, BertForMultipleChoice, BertModel


def skip_where_the_length_is_fixed(strict):
    """Strict export takes no free length on torch 2.6."""
    if strict and Version(torch.__version__) < Version("2.7"):
        pytest.skip("strict export fixes the length on torch 2.6")


@pytest.mark.parametrize(
    "model_class, dims, strict",
    [(model_class, "dynamic", False) for model_class in HEADS]
    + [(BertForMaskedLM, "dynamic", True), (BertForMultipleChoice, "named", False)],
    ids=name_of,
)
def test_exported_programs_take_other_batch_sizes_and_lengths(model_class, dims, strict):
    skip_where_the_length_is_fixed(strict)
    model = gradless(head(model_class, num_hidden_layers=1))
    call = call_of(model_class, labels=False)
    rank = call["input_ids"].dim()
    if dims == "dynamic":
        free = {0: torch.export.Dim.DYNAMIC, rank - 1: torch.export.Dim.DYNAMIC}
    else:
        free = {0: torch.export.Dim("batch", max=64), rank - 1: torch.export.Dim("length", max=4096)}
    shapes = {name: free for name in call}
    program = torch.export.export(model, (), call, dynamic_shapes=shapes, strict=strict)
    for lengths in ((7, 4), (3, 20, 11), (90, 1, 17, 60)):
        call = call_of(model_class, lengths, labels=False)
        expected = model(**call)
        got = program.module()(**call)
        assert set(got) == set(expected)
        for name in expected:
            numerics.assert_same(got[name], expected[name], SAME, name)


@pytest.mark.parametrize("backend, strict", [*((backend, False) for backend in BACKENDS), ("auto", True)])
def test_exported_programs_answer_holes_and_empty_rows(backend, strict):
    skip_where_the_length_is_fixed(strict)
    model = gradless(head(BertModel, num_hidden_layers=1, attn_implementation=backend))
    ids, mask = ragged_batch([7, 4])
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": free, "attention_mask": free}
    example = {"input_ids": ids, "attention_mask": mask}
    program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=strict)
    ids, mask = holed_batch()
    got = program.module()(input_ids=ids, attention_mask=mask).last_hidden_state
    numerics.assert_same(got, model(ids, mask).last_hidden_state, SAME)
