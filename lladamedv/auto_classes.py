"""Registration of our classes with Transformers' Auto classes, by import."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from lladamedv.modeling_lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration, LLaDAMedVModel
from lladamedv.processing import LLaDAMedVImageProcessor, LLaDAMedVProcessor


AutoConfig.register("lladamedv", LLaDAMedVConfig)
AutoModel.register(LLaDAMedVConfig, LLaDAMedVModel)
AutoModelForCausalLM.register(LLaDAMedVConfig, LLaDAMedVForConditionalGeneration)
AutoModelForImageTextToText.register(LLaDAMedVConfig, LLaDAMedVForConditionalGeneration)
AutoModelForMultimodalLM.register(LLaDAMedVConfig, LLaDAMedVForConditionalGeneration)
AutoImageProcessor.register(LLaDAMedVConfig, image_processor_classes={"pil": LLaDAMedVImageProcessor})
AutoProcessor.register(LLaDAMedVConfig, LLaDAMedVProcessor)
