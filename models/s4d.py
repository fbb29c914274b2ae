"""S4D: a diagonal state space model, applied as one long convolution (Gu, Goel, Gupta and Re 2022).

Shapes: B batch, L length, H channels, N real state size (N/2 complex modes, each standing for a conjugate pair),
R outputs per channel (2 if the directions are concatenated, else 1), F = L + 1 frequencies of a transform of length 2L.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def _lin(modes: int) -> tuple[Tensor, Tensor]:
    """S4D-Lin: A_n = -1/2 + i pi n, B = 1 -> A, B (N/2,) complex128."""
    n = torch.arange(modes, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n), torch.ones_like(n).to(torch.complex128)


def _inv(modes: int) -> tuple[Tensor, Tensor]:
    """S4D-Inv: A_n = -1/2 + i N/pi (N/(2n + 1) - 1), B = 1 -> A, B (N/2,) complex128."""
    n, size = torch.arange(modes, dtype=torch.float64), 2 * modes
    imag = size / math.pi * (size / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), imag), torch.ones_like(n).to(torch.complex128)


def _legs(modes: int) -> tuple[Tensor, Tensor]:
    """S4D-LegS: HiPPO-LegS without its rank-one part, diagonalized -> A, B (N/2,) complex128.

    What is left after that part is -1/2 plus a skew-symmetric matrix, so the eigenvectors V are unitary and B becomes
    V* B. Eigenvalues come in conjugate pairs; the half with a positive imaginary part is kept. B grows with frequency,
    to 41 at N = 64; like S4's code, it is cut at modulus 2.
    """
    root = (2 * torch.arange(2 * modes, dtype=torch.float64) + 1).sqrt()  # (N,), also HiPPO's B
    lower = (root[:, None] * root).tril(-1)
    skew = 0.5 * (lower.mT - lower)
    imag, vectors = torch.linalg.eigh(-1j * skew)  # ascending
    B = vectors.mH @ root.to(torch.complex128)
    B = B * (2 / B.abs()).clamp(max=1)
    return torch.complex(torch.full_like(imag, -0.5), imag)[modes:], B[modes:]


INITS = {"lin": _lin, "inv": _inv, "legs": _legs}
DISCRETIZATIONS = ("zoh", "bilinear")


class S4DKernel(nn.Module):
    """Convolution kernels of H independent channels: K[l] = 2 Re sum_n C_n dB_n dA_n^l (S4D sec. 3).

    Complex parameters trip optimizers, DDP's buckets and averaging, so B and C are stored as (real, imaginary) and A as
    log(-Re A) and Im A. They should stay float32: they are raised to float32 here if they are not, but a module cast to
    bfloat16 has lost digits of A and dt that the powers of dA need.
    """

    def __init__(
        self, channels: int, d_state: int, disc: str, init: str, dt_min: float, dt_max: float, trainable_B: bool
    ) -> None:
        super().__init__()
        self.disc = disc
        A, B = (value.repeat(channels, 1) for value in INITS[init](d_state // 2))  # (H, N/2)
        log_dt = torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max))
        self.log_dt = nn.Parameter(log_dt)  # (H,)
        self.log_A_real = nn.Parameter((-A.real).log().float())
        self.A_imag = nn.Parameter(A.imag.float())
        self.B = nn.Parameter(torch.view_as_real(B).float(), requires_grad=trainable_B)  # (H, N/2, 2)
        self.C = nn.Parameter(torch.randn(*B.shape, 2) * math.sqrt(0.5))  # complex normal, variance 1

    def forward(self, length: int) -> Tensor:
        """-> K (H, L), at least float32.

        With l = a S + b and S near sqrt(L), dA^l = dA^(aS) dA^b, and the sum over n is one product of (H, L/S, N/2) and
        (H, N/2, S): exact, with as many multiply-adds as the sum itself, but never a tensor of size H N/2 L. Only the
        real part of the complex product is wanted, which is a real product over N values.
        """
        log_dt, log_A_real, A_imag, B, C = (
            wide(p) for p in (self.log_dt, self.log_A_real, self.A_imag, self.B, self.C)
        )
        A = torch.complex(-log_A_real.exp(), A_imag)  # (H, N/2)
        dt = log_dt.exp()[:, None]
        if self.disc == "zoh":
            log_dA = dt * A
            dB = torch.expm1(log_dA) / A
        else:
            half = dt * A / 2
            log_dA = 2 * torch.atanh(half)  # dA = (1 + half) / (1 - half), without the cancellation at small dt
            dB = dt / (1 - half)
        weights = 2 * torch.view_as_complex(B.contiguous()) * torch.view_as_complex(C.contiguous()) * dB  # (H, N/2)

        step = math.ceil(math.sqrt(length))  # S
        b = torch.arange(step, device=dt.device, dtype=dt.dtype)
        a = step * torch.arange(math.ceil(length / step), device=dt.device, dtype=dt.dtype)
        coarse = weights[:, None] * (log_dA[:, None] * a[:, None]).exp()  # (H, L/S, N/2)
        fine = (log_dA[..., None] * b).exp()  # (H, N/2, S)
        K = torch.cat([coarse.real, -coarse.imag], dim=2) @ torch.cat([fine.real, fine.imag], dim=1)  # (H, L/S, S)
        return K.flatten(1)[:, :length]


class S4D(nn.Module):
    """y = K * u + D u per channel, in one direction or in both, nothing else: (B, L, H) -> (B, L, R H).

    direction "bi" adds an independent SSM that reads from the end: y[t] = sum_{s >= t} K[s-t] u[s] + D u[t].
    bi_merge "concat" gives [forward | backward] channels (R = 2), "sum" their sum.

    It computes in float32 whatever autocast says: no FFT runs in bfloat16, and in float16 only powers of two do.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 64,
        *,
        direction: str = "bi",
        bi_merge: str = "concat",
        disc: str = "zoh",
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        trainable_B: bool = True,
    ) -> None:
        super().__init__()
        self.direction, self.bi_merge = direction, bi_merge
        copies = 2 if direction == "bi" else 1
        self.kernel = S4DKernel(copies * channels, d_state, disc, init, dt_min, dt_max, trainable_B)
        self.D = nn.Parameter(torch.randn(copies * channels))
        self.cached: tuple[int, Tensor, Tensor] | None = None  # length, weights, response

    def forward(self, u: Tensor) -> Tensor:
        """u (B, L, H), any L >= 1 -> (B, L, R H) in u's type."""
        length = u.shape[1]
        with _without_autocast(u.device.type):
            spectrum = torch.fft.rfft(wide(u).mT, n=2 * length)  # (B, H, F); zero-padded, so nothing wraps round
            y = torch.fft.irfft(spectrum[:, None] * self.response(length), n=2 * length)[..., :length]  # (B, R, H, L)
        return y.flatten(1, 2).mT.to(u.dtype)

    def response(self, length: int) -> Tensor:
        """Frequency response (R, H, F) complex, skips included; kept between calls in eval mode without gradients.

        It is reused only while length, device and every weight, bit for bit, are those it was made from. Counting the
        weights' in-place changes would be cheaper, but Lightning swaps averaged weights through `.data`, uncounted.
        """
        if self.training or torch.is_grad_enabled():
            self.cached = None
            return self._response(length)
        weights = torch.cat([parameter.flatten() for parameter in self.parameters()])
        if self.cached is not None:
            known_length, known_weights, response = self.cached
            alike = (length, weights.device, weights.dtype) == (known_length, known_weights.device, known_weights.dtype)
            if alike and torch.equal(weights, known_weights):
                return response
        self.cached = (length, weights, self._response(length))
        return self.cached[2]

    def _response(self, length: int) -> Tensor:
        # The skip is a tap of D at lag 0, the same at every frequency.
        response = torch.fft.rfft(self.kernel(length), n=2 * length) + wide(self.D)[:, None]  # (copies H, F)
        if self.direction == "forward":
            return response[None]
        ahead, back = response.chunk(2)
        back = back.conj()  # runs a real kernel backwards in time
        return (ahead + back)[None] if self.bi_merge == "sum" else torch.stack([ahead, back])


def ssm_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A, B, C and dt of every S4D in `module`: no weight decay, and a learning rate of their own where one is set.

    Found by walking the modules, because an attribute on a parameter is lost when the module is deep-copied.
    """
    return [p for kernel in module.modules() if isinstance(kernel, S4DKernel) for p in kernel.parameters()]


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off, on devices that have it (meta has not)."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()
