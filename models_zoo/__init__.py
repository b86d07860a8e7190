"""Models, batches and losses that the tests and the benchmark of the memory planner train."""

from __future__ import annotations

from models_zoo.bert import (
    bert,
    bert_example,
    bert_example_small,
    bert_small,
)
from models_zoo.cnn import (
    cnn,
    cnn_example,
    cnn_example_small,
    cnn_small,
)
from models_zoo.densenet import (
    densenet121,
    densenet121_example,
    densenet121_example_small,
    densenet121_small,
)
from models_zoo.entry import Entry, Example, cross_entropy_loss, own_loss, token_loss
from models_zoo.gpt import (
    gpt,
    gpt_example,
    gpt_example_small,
    gpt_small,
)
from models_zoo.lstm import (
    lstm,
    lstm_example,
    lstm_example_small,
    lstm_small,
)
from models_zoo.mlp import (
    mlp,
    mlp_example,
    mlp_example_small,
    mlp_small,
)
from models_zoo.mobilenet import (
    mobilenet_v2,
    mobilenet_v2_example,
    mobilenet_v2_example_small,
    mobilenet_v2_small,
)
from models_zoo.resnet import (
    resnet18,
    resnet18_example,
    resnet18_example_small,
    resnet18_small,
    resnet50,
    resnet50_example,
    resnet50_example_small,
    resnet50_small,
)
from models_zoo.unet import (
    unet,
    unet_example,
    unet_example_small,
    unet_small,
)
from models_zoo.vgg import (
    vgg16_bn,
    vgg16_bn_example,
    vgg16_bn_example_small,
    vgg16_bn_small,
)
from models_zoo.vit import (
    vit,
    vit_example,
    vit_example_small,
    vit_small,
)

__all__ = [
    "MODELS",
    "Entry",
    "Example",
    "bert",
    "cnn",
    "densenet121",
    "gpt",
    "lstm",
    "mlp",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "unet",
    "vgg16_bn",
    "vit",
]

MODELS: dict[str, Entry] = {
    "resnet18": Entry(
        name="resnet18",
        build=resnet18,
        build_small=resnet18_small,
        example=resnet18_example,
        example_small=resnet18_example_small,
        loss=cross_entropy_loss,
        source="He et al., Deep Residual Learning for Image Recognition, CVPR 2016",
    ),
    "resnet50": Entry(
        name="resnet50",
        build=resnet50,
        build_small=resnet50_small,
        example=resnet50_example,
        example_small=resnet50_example_small,
        loss=cross_entropy_loss,
        source="He et al., Deep Residual Learning for Image Recognition, CVPR 2016",
    ),
    "vgg16_bn": Entry(
        name="vgg16_bn",
        build=vgg16_bn,
        build_small=vgg16_bn_small,
        example=vgg16_bn_example,
        example_small=vgg16_bn_example_small,
        loss=cross_entropy_loss,
        source="Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015",
    ),
    "mobilenet_v2": Entry(
        name="mobilenet_v2",
        build=mobilenet_v2,
        build_small=mobilenet_v2_small,
        example=mobilenet_v2_example,
        example_small=mobilenet_v2_example_small,
        loss=cross_entropy_loss,
        source="Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018",
    ),
    "densenet121": Entry(
        name="densenet121",
        build=densenet121,
        build_small=densenet121_small,
        example=densenet121_example,
        example_small=densenet121_example_small,
        loss=cross_entropy_loss,
        source="Huang et al., Densely Connected Convolutional Networks, CVPR 2017",
    ),
    "unet": Entry(
        name="unet",
        build=unet,
        build_small=unet_small,
        example=unet_example,
        example_small=unet_example_small,
        loss=cross_entropy_loss,
        source="Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, 2015",
    ),
    "vit": Entry(
        name="vit",
        build=vit,
        build_small=vit_small,
        example=vit_example,
        example_small=vit_example_small,
        loss=cross_entropy_loss,
        source="Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021; size S as in DeiT, 2021",
    ),
    "gpt": Entry(
        name="gpt",
        build=gpt,
        build_small=gpt_small,
        example=gpt_example,
        example_small=gpt_example_small,
        loss=own_loss,
        source="Radford et al., Language Models are Unsupervised Multitask Learners, 2019",
    ),
    "bert": Entry(
        name="bert",
        build=bert,
        build_small=bert_small,
        example=bert_example,
        example_small=bert_example_small,
        loss=token_loss,
        source="Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, NAACL 2019",
    ),
    "lstm": Entry(
        name="lstm",
        build=lstm,
        build_small=lstm_small,
        example=lstm_example,
        example_small=lstm_example_small,
        loss=token_loss,
        source="Zaremba et al., Recurrent Neural Network Regularization, 2014 (the model without dropout)",
    ),
    "mlp": Entry(
        name="mlp",
        build=mlp,
        build_small=mlp_small,
        example=mlp_example,
        example_small=mlp_example_small,
        loss=cross_entropy_loss,
        source="Rumelhart et al., Learning Representations by Back-propagating Errors, Nature 1986",
    ),
    "cnn": Entry(
        name="cnn",
        build=cnn,
        build_small=cnn_small,
        example=cnn_example,
        example_small=cnn_example_small,
        loss=cross_entropy_loss,
        source="McMahan et al., Communication-Efficient Learning of Deep Networks, AISTATS 2017",
    ),
}
