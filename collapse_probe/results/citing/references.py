"""The papers behind metrics, presets and fixes, each once, for `cite`, pages and documentation."""

from __future__ import annotations

import re
from collections.abc import Iterable

from collapse_probe.results.citing.publication import JMLR, Reference

CVPR = "Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition"
ICLR, ICML = "International Conference on Learning Representations", "International Conference on Machine Learning"
NEURIPS = "Advances in Neural Information Processing Systems"
REFERENCES = (
    Reference(
        "zhou2021deepvit",
        "DeepViT: Towards Deeper Vision Transformer",
        "Zhou, Daquan and Kang, Bingyi and Jin, Xiaojie and Yang, Linjie and Lian, Xiaochen and Jiang, Zihang and Hou, Qibin "
        "and Feng, Jiashi",
        2021,
        "2103.11886",
    ),
    Reference(
        "chen2022diversity",
        "The Principle of Diversity: Training Stronger Vision Transformers Calls for Reducing All Levels of Redundancy",
        "Chen, Tianlong and Zhang, Zhenyu and Cheng, Yu and Awadallah, Ahmed and Wang, Zhangyang",
        2022,
        "2203.06345",
        CVPR,
        "12020--12030",
    ),
    Reference(
        "gong2021patch",
        "Vision Transformers with Patch Diversification",
        "Gong, Chengyue and Wang, Dilin and Li, Meng and Chandra, Vikas and Liu, Qiang",
        2021,
        "2104.12753",
    ),
    Reference(
        "dong2021attention",
        "Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially with Depth",
        "Dong, Yihe and Cordonnier, Jean-Baptiste and Loukas, Andreas",
        2021,
        "2103.03404",
        ICML,
        "2793--2803",
    ),
    Reference(
        "wang2022antioversmoothing",
        "Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis: From Theory to Practice",
        "Wang, Peihao and Zheng, Wenqing and Chen, Tianlong and Wang, Zhangyang",
        2022,
        "2203.05962",
        ICLR,
    ),
    Reference(
        "zhai2023stabilizing",
        "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        "Zhai, Shuangfei and Likhomanenko, Tatiana and Littwin, Etai and Busbridge, Dan and Ramapuram, Jason and Zhang, Yizhe "
        "and Gu, Jiatao and Susskind, Joshua M.",
        2023,
        "2303.06296",
        ICML,
        "40770--40803",
    ),
    Reference(
        "darcet2024registers",
        "Vision Transformers Need Registers",
        "Darcet, Timothée and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr",
        2024,
        "2309.16588",
        ICLR,
    ),
    Reference(
        "guo2023contranorm",
        "ContraNorm: A Contrastive Learning Perspective on Oversmoothing and Beyond",
        "Guo, Xiaojun and Wang, Yifei and Du, Tianqi and Wang, Yisen",
        2023,
        "2303.06562",
        ICLR,
    ),
    Reference(
        "nguyen2023mitigating",
        "Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals",
        "Nguyen, Tam and Nguyen, Tan M. and Baraniuk, Richard G.",
        2023,
        "2312.00751",
        NEURIPS,
    ),
    Reference(
        "touvron2021going",
        "Going deeper with Image Transformers",
        "Touvron, Hugo and Cord, Matthieu and Sablayrolles, Alexandre and Synnaeve, Gabriel and Jégou, Hervé",
        2021,
        "2103.17239",
    ),
    Reference(
        "zhou2021refiner",
        "Refiner: Refining Self-attention for Vision Transformers",
        "Zhou, Daquan and Shi, Yujun and Kang, Bingyi and Yu, Weihao and Jiang, Zihang and Li, Yuan and Jin, Xiaojie and "
        "Hou, Qibin and Feng, Jiashi",
        2021,
        "2106.03714",
    ),
    Reference(
        "zehui2019dropattention",
        "DropAttention: A Regularization Method for Fully-Connected Self-Attention Networks",
        "Zehui, Lin and Liu, Pengfei and Huang, Luyao and Chen, Junkun and Qiu, Xipeng and Huang, Xuanjing",
        2019,
        "1907.11065",
    ),
    Reference(
        "liu2021hyperspherical",
        "Learning with Hyperspherical Uniformity",
        "Liu, Weiyang and Lin, Rongmei and Liu, Zhen and Xiong, Li and Schölkopf, Bernhard and Weller, Adrian",
        2021,
        "2103.01649",
        "AISTATS",
    ),
    Reference(
        "liu2018learning",
        "Learning towards Minimum Hyperspherical Energy",
        "Liu, Weiyang and Lin, Rongmei and Liu, Zhen and Liu, Lixin and Yu, Zhiding and Dai, Bo and Song, Le",
        2018,
        "1805.09298",
        NEURIPS,
    ),
    Reference(
        "abnar2020quantifying",
        "Quantifying Attention Flow in Transformers",
        "Abnar, Samira and Zuidema, Willem",
        2020,
        "2005.00928",
        "Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics",
        "4190--4197",
    ),
    Reference(
        "nguyen2020wide",
        "Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network Representations Vary with Width and "
        "Depth",
        "Nguyen, Thao and Raghu, Maithra and Kornblith, Simon",
        2020,
        "2010.15327",
    ),
    Reference(
        "raghu2021vision",
        "Do Vision Transformers See Like Convolutional Neural Networks?",
        "Raghu, Maithra and Unterthiner, Thomas and Kornblith, Simon and Zhang, Chiyuan and Dosovitskiy, Alexey",
        2021,
        "2108.08810",
        NEURIPS,
    ),
    Reference(
        "xiao2024streaming",
        "Efficient Streaming Language Models with Attention Sinks",
        "Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and Lewis, Mike",
        2024,
        "2309.17453",
        ICLR,
    ),
    Reference(
        "rusch2023survey",
        "A Survey on Oversmoothing in Graph Neural Networks",
        "Rusch, T. Konstantin and Bronstein, Michael M. and Mishra, Siddhartha",
        2023,
        "2303.10993",
    ),
    Reference(
        "dosovitskiy2021image",
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        "Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and Zhai, Xiaohua and "
        "Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and Heigold, Georg and Gelly, Sylvain and "
        "Uszkoreit, Jakob and Houlsby, Neil",
        2021,
        "2010.11929",
        ICLR,
    ),
    Reference(
        "roy2007effective",
        "The Effective Rank: A Measure of Effective Dimensionality",
        "Roy, Olivier and Vetterli, Martin",
        2007,
        venue="15th European Signal Processing Conference",
        pages="606--610",
    ),
    Reference(
        "garrido2023rankme",
        "{RankMe}: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank",
        "Garrido, Quentin and Balestriero, Randall and Najman, Laurent and LeCun, Yann",
        2023,
        "2210.02885",
        ICML,
    ),
    Reference(
        "agrawal2022alpha",
        "$\\alpha$-{ReQ}: Assessing Representation Quality in Self-Supervised Learning by Measuring Eigenspectrum Decay",
        "Agrawal, Kumar Krishna and Mondal, Arnab Kumar and Ghosh, Arna and Richards, Blake",
        2022,
        venue=NEURIPS,
    ),
    Reference(
        "thilak2024lidar",
        "{LiDAR}: Sensing Linear Probing Performance in Joint Embedding {SSL} Architectures",
        "Thilak, Vimal and Huang, Chen and Saremi, Omid and Dinh, Laurent and Goh, Hanlin and Nakkiran, Preetum and "
        "Susskind, Joshua M. and Littwin, Etai",
        2024,
        "2312.04000",
        ICLR,
    ),
    Reference(
        "bao2024localize",
        "Self-attention Networks Localize When {QK}-eigenspectrum Concentrates",
        "Bao, Han and Hataya, Ryuichiro and Karakida, Ryo",
        2024,
        "2402.02098",
        ICML,
    ),
    Reference(
        "sun2024massive",
        "Massive Activations in Large Language Models",
        "Sun, Mingjie and Chen, Xinlei and Kolter, J. Zico and Liu, Zhuang",
        2024,
        "2402.17762",
    ),
    Reference(
        "simeoni2025dino",
        "{DINOv3}",
        "Siméoni, Oriane and Vo, Huy V. and Seitzer, Maximilian and Baldassarre, Federico and Oquab, "
        "Maxime and Jose, Cijo and Khalidov, Vasil and Szafraniec, Marc and Yi, Seungeun and Ramamonjisoa, "
        "Michaël and Massa, Francisco and Haziza, Daniel and Wehrstedt, Luca and Wang, Jianyuan and "
        "Darcet, Timothée and Moutakanni, Théo and Sentana, Leonel and Roberts, Claire and Vedaldi, "
        "Andrea and Tolan, Jamie and Brandt, John and Couprie, Camille and Mairal, Julien and Jégou, "
        "Hervé and Labatut, Patrick and Bojanowski, Piotr",
        2025,
        "2508.10104",
    ),
    Reference(
        "song2012feature",
        "Feature Selection via Dependence Maximization",
        "Song, L. and Smola, A. and Gretton, A. and Bedo, J. and Borgwardt, K.",
        2012,
        venue=JMLR,
        pages="1393--1434",
    ),
    Reference(
        "qiu2025gated",
        "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
        "Qiu, Zihan and Wang, Zekun and Zheng, Bo and Huang, Zeyu and Wen, Kaiyue and Yang, Songlin and Men, Rui and Yu, Le "
        "and Huang, Fei and Huang, Suozhi and Liu, Dayiheng and Zhou, Jingren and Lin, Junyang",
        2025,
        "2505.06708",
        NEURIPS,
    ),
    Reference(
        "zhou2025value",
        "Value Residual Learning",
        "Zhou, Zhanchao and Wu, Tianyi and Jiang, Zhiyun and Obeid, Fares and Lan, Zhenzhong",
        2025,
        "2410.17897",
    ),
    Reference(
        "henry2020query",
        "Query-Key Normalization for Transformers",
        "Henry, Alex and Dachapally, Prudhvi Raj and Pawar, Shubham Shantaram and Chen, Yuxuan",
        2020,
        "2010.04245",
    ),
    Reference(
        "dehghani2023scaling",
        "Scaling Vision Transformers to 22 Billion Parameters",
        "Dehghani, Mostafa and Djolonga, Josip and Mustafa, Basil and Padlewski, Piotr and Heek, Jonathan and Gilmer, Justin "
        "and Steiner, Andreas and Caron, Mathilde and Geirhos, Robert and Alabdulmohsin, Ibrahim and Jenatton, Rodolphe and "
        "Beyer, Lucas and Tschannen, Michael and Arnab, Anurag and Wang, Xiao and Riquelme, Carlos and Minderer, Matthias and "
        "Puigcerver, Joan and Evci, Utku and Kumar, Manoj and van Steenkiste, Sjoerd and Elsayed, Gamaleldin F. and "
        "Mahendran, Aravindh and Yu, Fisher and Oliver, Avital and Huot, Fantine and Bastings, Jasmijn and Collier, Mark "
        "Patrick and Gritsenko, Alexey and Birodkar, Vighnesh and Vasconcelos, Cristina and Tay, Yi and Mensink, Thomas and "
        "Kolesnikov, Alexander and Paveti{\\'c}, Filip and Tran, Dustin and Kipf, Thomas and Lu{\\v{c}}i{\\'c}, Mario and "
        "Zhai, Xiaohua and Keysers, Daniel and Harmsen, Jeremiah and Houlsby, Neil",
        2023,
        "2302.05442",
        ICML,
    ),
    Reference(
        "sun2025curse",
        "The Curse of Depth in Large Language Models",
        "Sun, Wenfang and Song, Xinyuan and Li, Pengxiang and Yin, Lu and Zheng, Yefeng and Liu, Shiwei",
        2025,
        "2502.05795",
    ),
    Reference(
        "noci2023shaped",
        "The Shaped Transformer: Attention Models in the Infinite Depth-and-Width Limit",
        "Noci, Lorenzo and Li, Chuning and Li, Mufan Bill and He, Bobby and Hofmann, Thomas and Maddison, Chris J. and Roy, "
        "Daniel M.",
        2023,
        "2306.17759",
        NEURIPS,
    ),
    Reference(
        "he2024simplifying",
        "Simplifying Transformer Blocks",
        "He, Bobby and Hofmann, Thomas",
        2024,
        "2311.01906",
        ICLR,
    ),
    Reference(
        "naitsaada2025mind",
        "Mind the Gap: a Spectral Analysis of Rank Collapse and Signal Propagation in Attention Layers",
        "Nait Saada, Thiziri and Naderi, Alireza and Tanner, Jared",
        2025,
        "2410.07799",
        ICML,
    ),
    Reference(
        "ye2025differential",
        "Differential Transformer",
        "Ye, Tianzhu and Dong, Li and Xia, Yuqing and Sun, Yutao and Zhu, Yi and Huang, Gao and Wei, Furu",
        2025,
        "2410.05258",
        ICLR,
    ),
    Reference(
        "men2024shortgpt",
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        "Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and Lu, Yaojie and Han, Xianpei and "
        "Chen, Weipeng",
        2024,
        "2403.03853",
    ),
    Reference(
        "gromov2024unreasonable",
        "The Unreasonable Ineffectiveness of the Deeper Layers",
        "Gromov, Andrey and Tirumala, Kushal and Shapourian, Hassan and Glorioso, Paolo and Roberts, Daniel A.",
        2024,
        "2403.17887",
    ),
    Reference(
        "he2024what",
        "What Matters in Transformers? Not All Attention is Needed",
        "He, Shwai and Sun, Guoheng and Shen, Zheyu and Li, Ang",
        2024,
        "2406.15786",
    ),
    Reference(
        "csordas2025do",
        "Do Language Models Use Their Depth Efficiently?",
        "Csord{\\'a}s, R{\\'o}bert and Manning, Christopher D. and Potts, Christopher",
        2025,
        "2505.13898",
    ),
    Reference(
        "jacobs2025block",
        "Block-Recurrent Dynamics in Vision Transformers",
        "Jacobs, Mozes and Fel, Thomas and Hakim, Richard and Brondetta, Alessandra and Ba, Demba and Keller, T. Andy",
        2025,
        "2512.19941",
    ),
    Reference(
        "fesser2026unifying",
        "A Unifying View of Attention Sinks: From Mechanisms to Architectural Interventions",
        "Fesser, Lukas and Jacobs, Mozes and Fel, Thomas and Keller, Andy and Kakade, Sham",
        2026,
        "2606.08105",
    ),
    Reference(
        "jiang2025vision",
        "Vision Transformers Don't Need Trained Registers",
        "Jiang, Nick and Dravid, Amil and Efros, Alexei A. and Gandelsman, Yossi",
        2025,
        "2506.08010",
        NEURIPS,
    ),
    Reference(
        "venkataramanan2024skip",
        "Skip-Attention: Improving Vision Transformers by Paying Less Attention",
        "Venkataramanan, Shashanka and Ghodrati, Amir and Asano, Yuki M. and Porikli, Fatih and Habibian, Amirhossein",
        2024,
        "2301.02240",
        ICLR,
    ),
    Reference("zhai2026exclusive", "Exclusive Self Attention", "Zhai, Shuangfei", 2026, "2603.09078"),
)
BY_KEY = {each.key: each for each in REFERENCES}
DEEPVIT, DIVERSITY, RANK = "zhou2021deepvit", "chen2022diversity", "roy2007effective"
METRICS: dict[str, tuple[str, ...]] = {  # by a metric's name without its settings; others are this project's own
    "angular-distance": ("gromov2024unreasonable",),
    "attention-distance": ("dosovitskiy2021image",),
    "attention-entropy": ("zhai2023stabilizing",),
    "attention-logits": ("zhai2023stabilizing",),
    "attention-rollout": ("abnar2020quantifying",),
    "attention-similarity": (DEEPVIT,),
    "attention-sink": ("xiao2024streaming",),
    "block-influence": ("men2024shortgpt", "he2024what"),
    "cls-patch-similarity": ("simeoni2025dino",),
    "cross-patch-similarity": (DIVERSITY,),
    "depth-phases": ("jacobs2025block",),
    "dirichlet-energy": ("rusch2023survey",),
    "embedding-rank": ("garrido2023rankme", "agrawal2022alpha", "thilak2024lidar"),
    "feature-similarity": (DEEPVIT,),
    "head-similarity": (DEEPVIT,),
    "hyperspherical-energy": ("liu2018learning", "liu2021hyperspherical"),
    "layer-cka": ("nguyen2020wide", "raghu2021vision", "song2012feature"),
    "massive-activations": ("sun2024massive",),
    "map-rank": (RANK, "dong2021attention"),
    "neighbour-similarity": (DEEPVIT,),
    "patch-diversity": ("gong2021patch",),
    "qk-spectrum": ("bao2024localize",),
    "rank-residual": ("dong2021attention",),
    "residual-contribution": ("csordas2025do",),
    "similar-blocks": (DEEPVIT,),
    "similarity-ratio": (DEEPVIT,),
    "sink-kind": ("fesser2026unifying",),
    "spectral-gap": ("naitsaada2025mind",),
    "token-frequency": ("wang2022antioversmoothing",),
    "token-norm": ("darcet2024registers",),
    "token-rank": (RANK,),
    "weight-orthogonality": (DIVERSITY,),
    "weight-rank": (DIVERSITY, RANK),
    "weight-similarity": (DIVERSITY,),
    "whole-map-similarity": (DIVERSITY,),
}
CAIT, REFINER = "touvron2021going", "zhou2021refiner"
FIXES: dict[str, tuple[str, ...]] = {
    "attn-scale": ("wang2022antioversmoothing",),
    "class-attention": (CAIT,),
    "contra-norm": ("guo2023contranorm",),
    "differential": ("ye2025differential",),
    "drop-attention": ("zehui2019dropattention", DEEPVIT),
    "exclusive-self-attention": ("zhai2026exclusive",),
    "feat-scale": ("wang2022antioversmoothing",),
    "gated-attention": ("qiu2025gated",),
    "layer-scale": (CAIT,),
    "layernorm-scaling": ("sun2025curse",),
    "neutreno": ("nguyen2023mitigating",),
    "qk-norm": ("henry2020query", "dehghani2023scaling"),
    "re-attention": (DEEPVIT,),
    "refiner": (REFINER,),
    "registers": ("darcet2024registers",),
    "shaped-attention": ("noci2023shaped", "he2024simplifying", "naitsaada2025mind"),
    "shared-attention": (REFINER,),
    "sigma-reparam": ("zhai2023stabilizing",),
    "skip-attention": ("venkataramanan2024skip",),
    "talking-heads": (CAIT,),
    "temperature": (DEEPVIT,),
    "test-time-registers": ("jiang2025vision",),
    "value-residual": ("zhou2025value",),
}
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def named_in(text: str) -> list[Reference]:
    """The publications whose arXiv number a text names.

    >>> [each.key for each in named_in("DeepViT, arXiv 2103.11886, Eq. 2")]
    ['zhou2021deepvit']
    """
    numbers = set(ARXIV.findall(text))
    return [each for each in REFERENCES if each.arxiv in numbers]


def of_metrics(names: Iterable[str]) -> list[Reference]:
    """The publications behind metrics, by their names with or without settings, in the order of REFERENCES."""
    keys = {key for name in names for key in METRICS.get(name.partition("@")[0], ())}
    return [each for each in REFERENCES if each.key in keys]


def fixes_in(text: str) -> list[str]:
    """The fixes that a text names.

    >>> fixes_in("vit_tiny + re-attention in all blocks")
    ['re-attention']
    """
    return [name for name in FIXES if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]
