package block

import (
	"hash/crc32"
	"math/bits"
)

// MoreCRC is the CRC of what has the CRC c, followed by p.
func MoreCRC(c uint32, p []byte) uint32 { return crc32.Update(c, Castagnoli, p) }

// JoinCRC is the CRC of what has the CRC a, followed by n bytes that have the CRC b: for 4 KiB it takes a
// sixth of the time that reading them again would.
//
// A CRC is a polynomial over GF(2) modulo P, and n bytes more multiply it by x^(8n); see zlib's crc32_combine.
func JoinCRC(a, b uint32, n int64) uint32 {
	for k := uint64(n); k != 0; k &= k - 1 {
		a = multiply(powers[bits.TrailingZeros64(k)], a)
	}
	return a ^ b
}

// powers[i] is x^(8·2^i) modulo P. Polynomials have the coefficient of x^0 in the highest bit, as CRC32C does.
var powers = func() (p [63]uint32) {
	p[0] = 1 << (31 - 8) // x^8
	for i := 1; i < len(p); i++ {
		p[i] = multiply(p[i-1], p[i-1])
	}
	return p
}()

// multiply is a·b modulo P.
func multiply(a, b uint32) (product uint32) {
	for ; a != 0; a <<= 1 {
		product ^= b & -(a >> 31)
		b = b>>1 ^ crc32.Castagnoli&-(b&1)
	}
	return product
}
