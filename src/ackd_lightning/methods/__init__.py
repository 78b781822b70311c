"""Distillation methods, one paper per file, with the networks that only this paper uses; nothing of Lightning."""

from ackd_lightning.methods.ackd import ACKD
from ackd_lightning.methods.acn import ACN
from ackd_lightning.methods.aikd import AIKD
from ackd_lightning.methods.at import AT
from ackd_lightning.methods.atsc import ATSC
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.methods.bdkd import BDKD
from ackd_lightning.methods.cc import CC
from ackd_lightning.methods.ce import CE
from ackd_lightning.methods.ceskd import CESKD
from ackd_lightning.methods.crd import CRD
from ackd_lightning.methods.dcm import DCM
from ackd_lightning.methods.dgkd import DGKD
from ackd_lightning.methods.dist import DIST
from ackd_lightning.methods.dkd import DKD
from ackd_lightning.methods.dpk import DPK
from ackd_lightning.methods.fitnet import FitNet
from ackd_lightning.methods.iakd import IAKD
from ackd_lightning.methods.infoflow import InfoFlow
from ackd_lightning.methods.itrd import ITRD
from ackd_lightning.methods.kd import KD
from ackd_lightning.methods.nkd import NKD
from ackd_lightning.methods.okd import OKD
from ackd_lightning.methods.one import ONE
from ackd_lightning.methods.p2p import P2P
from ackd_lightning.methods.pasm import PASM
from ackd_lightning.methods.reviewkd import ReviewKD
from ackd_lightning.methods.rkd import RKD
from ackd_lightning.methods.rld import RLD
from ackd_lightning.methods.semckd import SemCKD
from ackd_lightning.methods.skt import SKT
from ackd_lightning.methods.sp import SP
from ackd_lightning.methods.srrl import SRRL
from ackd_lightning.methods.sum import Sum
from ackd_lightning.methods.ttm import TTM
from ackd_lightning.methods.vid import VID
from ackd_lightning.methods.vkd import VkD

__all__ = [
    "ACKD",
    "ACN",
    "AIKD",
    "AT",
    "ATSC",
    "BDKD",
    "CC",
    "CE",
    "CESKD",
    "CRD",
    "DCM",
    "DGKD",
    "DIST",
    "DKD",
    "DPK",
    "IAKD",
    "ITRD",
    "KD",
    "NKD",
    "OKD",
    "ONE",
    "P2P",
    "PASM",
    "RKD",
    "RLD",
    "SKT",
    "SP",
    "SRRL",
    "TTM",
    "VID",
    "FitInfo",
    "FitNet",
    "InfoFlow",
    "Method",
    "Networks",
    "ReviewKD",
    "SemCKD",
    "Sum",
    "VkD",
]
