"""Mistral3: Pixtral's vision tower, patches merged two by two, pictures of every size with marks at the ends of rows."""

from __future__ import annotations

from mmdpo_trainers.models.families.llava import Llava


class Mistral3(Llava):
    name = "mistral3"
    model_name = "Mistral3ForConditionalGeneration"
    processor_name = "PixtralProcessor"
    processor_counts = True
    official_regions = False
