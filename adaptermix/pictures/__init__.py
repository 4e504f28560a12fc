"""Pictures as SVG, and pages of HTML, made from JSON documents of reports without another library."""

from .documents import picture_of as picture_of
from .documents import pictures_of as pictures_of
from .svg import Picture as Picture
