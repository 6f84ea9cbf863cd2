"""MosaicBERT as an installed package: `pip install .`, then `from mosaicbert import BertForMaskedLM`."""

# pytest imports this file alone, without a package, in a clone whose folder has a hyphen in its name.
if __package__:
    from .bert_layers import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        BertPreTrainedModel,
    )
    from .configuration_bert import BertConfig

__version__ = "1.2.0"
__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertPreTrainedModel",
]
