package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"graindisk/block"
)

// Bytes is a number of bytes, never negative. In YAML, in the environment and on the command line it
// is written as ParseSize reads it.
type Bytes int64

// Powers of 1024.
const (
	KiB Bytes = 1 << 10
	MiB Bytes = 1 << 20
	GiB Bytes = 1 << 30
	TiB Bytes = 1 << 40
)

// The bounds of a disk's size.
const (
	DiskSizeMin = 1 * MiB
	DiskSizeMax = 64 * TiB
)

// units maps each suffix of a size to its factor.
var units = map[string]int64{
	"": 1, "B": 1,
	"K": 1 << 10, "KiB": 1 << 10, "M": 1 << 20, "MiB": 1 << 20,
	"G": 1 << 30, "GiB": 1 << 30, "T": 1 << 40, "TiB": 1 << 40,
	"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
}

// ParseSize reads a size: a whole number, alone (bytes) or with one of the units B K KiB M MiB G GiB T
// TiB (powers of 1024) and KB MB GB TB (powers of 1000) right behind it.
func ParseSize(s string) (Bytes, error) {
	digits := len(s) - len(strings.TrimLeft(s, "0123456789"))
	number, unit := s[:digits], s[digits:]
	if number == "" {
		if strings.HasPrefix(s, "-") {
			return 0, fmt.Errorf("size %q is negative", s)
		}
		return 0, fmt.Errorf("size %q: want a whole number and a unit, such as 10GiB", s)
	}
	factor, ok := units[unit]
	if !ok {
		return 0, fmt.Errorf("size %q: %q is not one of the units B K KiB M MiB G GiB T TiB KB MB GB TB", s, unit)
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n > math.MaxInt64/factor {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return Bytes(n * factor), nil
}

// String is the size in the largest power of 1024 that divides it, as ParseSize reads it.
func (b Bytes) String() string {
	for _, u := range []struct {
		name string
		size Bytes
	}{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}} {
		if b != 0 && b%u.size == 0 {
			return strconv.FormatInt(int64(b/u.size), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// MarshalText is String.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText is ParseSize.
func (b *Bytes) UnmarshalText(p []byte) (err error) {
	*b, err = ParseSize(string(p))
	return err
}

// CheckDiskName says what is wrong with the name of a disk: it must match [a-z0-9][a-z0-9._-]{0,62}.
// Pools and targets follow the same rule.
func CheckDiskName(name string) error {
	if name == "" {
		return errors.New("the name is empty")
	}
	if len(name) > 63 {
		return fmt.Errorf("name %q has %d characters, at most 63 are allowed", name, len(name))
	}
	for i, c := range []byte(name) {
		alnum := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		if !alnum && i == 0 {
			return fmt.Errorf("name %q must start with a-z or 0-9", name)
		}
		if !alnum && c != '.' && c != '_' && c != '-' {
			return fmt.Errorf("name %q: only a-z 0-9 . _ - are allowed", name)
		}
	}
	return nil
}

// CheckDiskSize says what is wrong with the size of a disk: it must be a multiple of 4 KiB, from 1 MiB
// to 64 TiB.
func CheckDiskSize(size Bytes) error {
	if size < DiskSizeMin || size > DiskSizeMax {
		return fmt.Errorf("disk size %v: must be %v to %v", size, DiskSizeMin, DiskSizeMax)
	}
	if size%block.Size != 0 {
		return fmt.Errorf("disk size %v: must be a multiple of %v (%v would do)", size, Bytes(block.Size),
			min((size+block.Size-1)/block.Size*block.Size, DiskSizeMax))
	}
	return nil
}

// ParseDisk reads NAME=SIZE, as --disk takes it, and checks both.
func ParseDisk(s string) (Disk, error) {
	name, text, ok := strings.Cut(s, "=")
	if !ok {
		return Disk{}, fmt.Errorf("disk %q: want NAME=SIZE, such as vm1=10GiB", s)
	}
	if err := CheckDiskName(name); err != nil {
		return Disk{}, fmt.Errorf("disk %q: %w", s, err)
	}
	size, err := ParseSize(text)
	if err == nil {
		err = CheckDiskSize(size)
	}
	if err != nil {
		return Disk{}, fmt.Errorf("disk %q: %w", s, err)
	}
	return Disk{Name: name, Size: size}, nil
}
