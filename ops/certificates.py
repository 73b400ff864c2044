"""Makes the cluster's certificate authority, and certificates of nodes and of HTTP endpoints.

Which files are whose is in ``ops/tls_files.py``.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bridge.tls import TlsFiles
from ops.home import create_secret_file, write_atomically

CA_DAYS: Final = 3650
NODE_DAYS: Final = 800
RENEW_DAYS: Final = 90  # a node certificate with less left is replaced at the next start
CLOCK_SKEW: Final = datetime.timedelta(days=1)


def make_missing(files: TlsFiles, ca_key: Path, host: str) -> None:
    """Make what is missing of a node on ``host``; keep the rest.

    Raises:
        OSError: nothing can be written.
        ValueError, TypeError: what is there is damaged or does not belong together.
    """
    if not Path(files.ca).exists():
        _make_ca(Path(files.ca), ca_key)
    pair = (Path(files.certificate), Path(files.key))
    if ca_key.exists() and not _serves(*pair, [host]):
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        _make_signed("phalanx node", pair, Path(files.ca), ca_key, [host], usages)


def make_missing_http(
    pair: tuple[Path, Path], ca: Path, ca_key: Path, hosts: Sequence[str]
) -> None:
    """Make the HTTP endpoint's certificate and key where they do not serve ``hosts`` any more.

    It cannot be shown as a client's, so whoever gets hold of it does not get into the cluster.

    Raises:
        OSError: nothing can be written.
        ValueError, TypeError: what is there is damaged, or the authority's key is elsewhere.
    """
    if not ca.exists():
        _make_ca(ca, ca_key)
    if _serves(*pair, hosts):
        return
    if not ca_key.exists():
        raise ValueError(f"{ca_key} is not here, and only with it a certificate can be made")
    _make_signed("phalanx http", pair, ca, ca_key, hosts, [ExtendedKeyUsageOID.SERVER_AUTH])


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """What peers may call this machine; an address also as a name, as OTP looks it up."""
    names: list[x509.GeneralName] = []
    for one in dict.fromkeys((*hosts, socket.gethostname(), "localhost", "127.0.0.1")):
        names.append(x509.DNSName(one.encode("idna").decode("ascii")))
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(one)))
        except ValueError:
            continue
    return names


def _serves(certificate: Path, key: Path, hosts: Sequence[str]) -> bool:
    """Whether a certificate and its key are there, good for a while, and for ``hosts``."""
    if not (certificate.exists() and key.exists()):
        return False
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.days >= RENEW_DAYS and set(hosts) <= set(names.get_values_for_type(x509.DNSName))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(name: str, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")


def _make_ca(certificate_file: Path, key_file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = "phalanx cluster authority"
    certificate = (
        _builder(name, CA_DAYS)
        .issuer_name(_name(name))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    write_atomically(key_file, _pem(key))
    # Last: a start that was cut short in between begins anew.
    create_secret_file(certificate_file, _text(certificate))


def _make_signed(
    name: str,
    pair: tuple[Path, Path],
    ca_file: Path,
    ca_key_file: Path,
    hosts: Sequence[str],
    usages: list[x509.ObjectIdentifier],
) -> None:
    certificate_file, key_file = pair
    ca = x509.load_pem_x509_certificate(ca_file.read_bytes())
    ca_key = serialization.load_pem_private_key(ca_key_file.read_bytes(), None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{ca_key_file} is no elliptic curve key")
    if ca_key.public_key() != ca.public_key():
        raise ValueError(f"{ca_key_file} is not the key of {ca_file}")
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    own_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, NODE_DAYS)
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
        .add_extension(issuer_key, critical=False)
        .add_extension(own_key, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    # Cut short anywhere, there is no certificate, and the pair is made again.
    certificate_file.unlink(missing_ok=True)
    write_atomically(key_file, _pem(key))
    write_atomically(certificate_file, _text(certificate))


def _text(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
