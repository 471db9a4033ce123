"""A judge that likes answers of about a given number of words."""

from online_dpo import Score


class Brevity:
    version = "1"

    def __init__(self, words=12):
        self.words = words

    def score(self, prompt, responses):
        counts = [len(response.text.split()) for response in responses]
        return [Score(-abs(n - self.words)) if n else Score(None, "no words") for n in counts]
