"""The classes of transformers that open for a task of `coverage_tasks.py` and are not counted, with the reason."""

# Reason -> names of classes.
_REASONS = {
    "a detector without its head, which is counted with it": "ConditionalDetrModel DFineModel DabDetrModel "
    "DeformableDetrModel Deimv2Model DetrModel LwDetrModel PPDocLayoutV2Model PPDocLayoutV3Model PPDocLayoutV4Model "
    "RfDetrModel RTDetrModel RTDetrV2Model TableTransformerModel",
    "a network of panoptic masks, whose head no task here opens": "Mask2FormerModel MaskFormerModel",
    "it reads texts, boxes, prompts or a second image beside the image": "Blip2Model EdgeTamModel EdgeTamVideoModel "
    "EfficientLoFTRModel GroundingDinoModel InstructBlipModel InstructBlipVideoModel Kosmos2Model "
    "LightGlueForKeypointMatching MMGroundingDinoModel OmDetTurboForObjectDetection SamHQModel SamModel Sam2Model "
    "Sam2VideoModel Sam3LiteTextModel Sam3LiteTextTextModel Sam3Model Sam3TrackerModel Sam3TrackerVideoModel "
    "Sam3VideoModel SegGptModel VisionEncoderDecoderModel",
    "it reads patches and their places, which its processor makes": "Cosmos3EdgeVisionModel Dots3NoteVisionModel "
    "GlmImageVisionModel HYV4VLVisionModel HunYuanVLVisionTransformer Inkling2VisionModel MiniCPMOcrVisionModel "
    "MiniCPMV4_7VisionModel MiniMaxM3VLVisionModel Molmo2VisionModel MuseGlimmerVisionModel MuseSparkVisionModel "
    "PaddleOCRVisionModel PixtralVisionModel Siglip2Model Siglip2VisionModel VideoLlama3VisionModel",
    "it reads videos": "TimesformerModel VideoMAEModel VivitModel XCLIPVisionModel",
    "it reads lines of text, or tables, and writes tokens": "MgpstrForSceneTextRecognition PPFormulaNetModel "
    "PPFormulaNetTextModel PPFormulaNetVisionModel PPOCRV5MobileRecModel PPOCRV5ServerRecModel PPOCRV6SmallRecModel "
    "PPOCRV6TinyRecModel",
    "a detector of text that returns no boxes": "PPOCRV5MobileDetForObjectDetection PPOCRV5MobileDetModel "
    "PPOCRV5ServerDetForObjectDetection PPOCRV5ServerDetModel PPOCRV6MediumDetForObjectDetection "
    "PPOCRV6MediumDetModel PPOCRV6SmallDetForObjectDetection PPOCRV6SmallDetModel",
    "its outputs are random": "ViTMAEModel",
    "a network of timm, passed as `timm_model`": "TimmBackbone TimmWrapperModel",
    "it needs the library natten": "DinatBackbone DinatModel",
    "its nested configs may be of any kind, which is refused": "DepthProForDepthEstimation DepthProModel",
    "its encoder is a wrapper of timm, which passes any arguments to it": "EdgeTamVisionModel",
    "it orders the objects above a threshold, whose number differs between images": "PPDocLayoutV2ForObjectDetection",
    "its boxes are quadrilaterals of ten coordinates": "PPDocLayoutV4ForObjectDetection",
    "it has no forward pass, and encodes images as tokens": "Apertus1p5VisionTokenizerModel",
}
OTHER_NETWORKS = {f"transformers/{name}": reason for reason, names in _REASONS.items() for name in names.split()}
