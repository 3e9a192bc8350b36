package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"graindisk/grains/bootprofile"
	"graindisk/grains/cache"
	"graindisk/grains/segment"
	"graindisk/internal/vfs"
	"graindisk/pool"
	"graindisk/pool/root"
	"graindisk/writeback"
)

func newInspectCmd(a *app) *cobra.Command {
	return newGroupCmd("inspect", "Decode stored formats for people, offline and read-only",
		a.newInspector("log DIR", "Decode the log in a tier directory of a pool that is not being served", func(dir string) (string, error) {
			var b bytes.Buffer
			err := writeback.Describe(&b, vfs.OS{}, dir)
			return b.String(), err
		}),
		a.newInspector("shard FILE", "Decode a shard object", fileInspector(func(b *bytes.Buffer, data []byte) error {
			return segment.Describe(b, data)
		})),
		a.newInspector("checkpoint FILE", "Decode a part of a published checkpoint", fileInspector(func(b *bytes.Buffer, data []byte) error {
			return pool.Describe(b, data)
		})),
		a.newInspector("root FILE", "Decode a copy of the root", fileInspector(func(b *bytes.Buffer, data []byte) error {
			return root.Describe(b, data)
		})),
		a.newInspector("beat FILE", "Decode an owner's beat", fileInspector(func(b *bytes.Buffer, data []byte) error {
			return pool.DescribeBeat(b, data)
		})),
		a.newInspector("quarantine DIR", "List what a log that lost its pool holds and nobody published, by disk and range", func(dir string) (string, error) {
			l, err := pool.ReadLost(vfs.OS{}, dir)
			if errors.Is(err, fs.ErrNotExist) {
				return "", fmt.Errorf("%s holds no list of what was lost: it is not the folder of a log that a takeover found out about (TIER/POOL, or quarantine-… in it; \"gateway pool status\" names it), or nothing was lost; \"gateway inspect log\" decodes any log: %w", dir, err)
			}
			if err != nil {
				return "", err
			}
			var b bytes.Buffer
			l.Describe(&b)
			return b.String(), nil
		}),
		a.newInspector("slot FILE", "Decode the index of a slot of the cache, slot-NNNNNN.idx on the tier", fileInspector(func(b *bytes.Buffer, data []byte) error {
			return cache.Describe(b, data)
		})),
		a.newInspector("boot FILE", "Decode a disk's boot profile, boot-NNNNNN on the tier", fileInspector(func(b *bytes.Buffer, data []byte) error {
			return bootprofile.Describe(b, data)
		})),
		a.newInspector("scrub FILE", "Decode the position of a scrub, scrub on the tier", fileInspector(func(b *bytes.Buffer, data []byte) error {
			return pool.DescribeScrub(b, data)
		})),
	)
}

func fileInspector(describe func(*bytes.Buffer, []byte) error) func(string) (string, error) {
	return func(path string) (string, error) {
		data, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		var b bytes.Buffer
		if err := describe(&b, data); err != nil {
			return b.String(), fmt.Errorf("%s: %w", path, err)
		}
		return b.String(), nil
	}
}

// newInspector is one inspect command. What could be decoded is printed even if the rest could not.
func (a *app) newInspector(use, short string, describe func(arg string) (string, error)) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			text, err := describe(args[0])
			if a.json && err == nil {
				return a.printJSON(struct {
					Lines []string `json:"lines"`
				}{strings.Split(strings.TrimRight(text, "\n"), "\n")})
			}
			if !a.json {
				fmt.Fprint(a.stdout, text)
			}
			return err
		},
	}
}
