"""Classification of texts: news, newsgroups, questions to a bank."""

from pydantic import Field

from fedlm.data.hub import HubTask


class AgNews(HubTask):
    """120,000 training and 7,600 test articles in four topics."""

    name = "ag_news"
    title = "AG News"
    reference = "Zhang et al. 2015, arXiv:1509.01626; hub fancyzhx/ag_news"
    splits = {"train": "train", "test": "test"}
    columns = {"text": "text", "label": "label"}
    label_names = ["World", "Sports", "Business", "Sci/Tech"]

    class Config(HubTask.Config):
        source: str = Field("fancyzhx/ag_news", min_length=1, description="hub id, or a local folder")


class TwentyNewsgroups(HubTask):
    """11,314 training and 7,532 test messages of 20 newsgroups, headers, footers and quotes removed."""

    name = "twenty_newsgroups"
    title = "20 Newsgroups"
    reference = "Lang 1995, doi:10.1016/B978-1-55860-377-6.50048-7; hub SetFit/20_newsgroups"
    splits = {"train": "train", "test": "test"}
    columns = {"text": "text", "label": "label"}

    class Config(HubTask.Config):
        max_length: int = Field(256, ge=8, le=1_000_000, description="longest model input, in tokens")
        source: str = Field("SetFit/20_newsgroups", min_length=1, description="hub id, or a local folder")


class Banking77(HubTask):
    """10,003 training and 3,080 test questions of bank customers with 77 intents."""

    name = "banking77"
    title = "Banking77"
    reference = "Casanueva et al. 2020, arXiv:2003.04807; hub legacy-datasets/banking77"
    splits = {"train": "train", "test": "test"}
    columns = {"text": "text", "label": "label"}

    class Config(HubTask.Config):
        max_length: int = Field(64, ge=8, le=1_000_000, description="longest model input, in tokens")
        source: str = Field(
            "legacy-datasets/banking77", min_length=1, description="hub id, or a local folder"
        )
