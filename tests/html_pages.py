"""HTML as tests look at it: its elements, which must be closed and nested, and how well colours can be told apart."""

from html.parser import HTMLParser

import numpy as np


class Page(HTMLParser):
    """Elements as (tag, attributes, pieces of text); those that stay open are an error."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in ("img", "meta", "br"):
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self._open:
            text.append(data)

    @property
    def tags(self):
        return {tag for tag, _, _ in self.elements}

    def attributes(self, css_class):
        return [found for _, found, _ in self.elements if css_class in found.get("class", "").split()]

    def texts(self, tag=None, css_class=None):
        return [
            "".join(text)
            for name, attributes, text in self.elements
            if tag in (None, name) and css_class in (None, *attributes.get("class", "").split())
        ]


def contrast(one, other):
    """Of two colours, as #rrggbb: WCAG 2.2."""

    def luminance(color):
        channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
