package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"graindisk/frontend/nbd/nbdclient"
)

const blockBytes = 4096

// newCheckExportCmd is a client's look at a served disk, used by "make run". It leaves the disk as it was.
func newCheckExportCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:    "check-export URI",
		Short:  "Connect to an export and try its last block, unless it holds data",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
			defer cancel()
			return runCheckExport(ctx, a, args[0])
		},
	}
}

func runCheckExport(ctx context.Context, a *app, uri string) error {
	c, err := nbdclient.Dial(ctx, uri, nbdclient.Options{})
	if err != nil {
		return fmt.Errorf("%s: %w", uri, err)
	}
	defer c.Close()
	last := c.Size() - blockBytes
	was := make([]byte, blockBytes)
	if err := c.ReadAt(ctx, was, last); err != nil {
		return fmt.Errorf("%s: %w", uri, err)
	}
	if !bytes.Equal(was, make([]byte, blockBytes)) {
		fmt.Fprintf(a.stdout, "%s: %d bytes, holds data, reads well\n", uri, c.Size())
		return nil
	}
	now, back := make([]byte, blockBytes), make([]byte, blockBytes)
	rand.Read(now)
	for _, step := range []func() error{
		func() error { return c.WriteAt(ctx, now, last, true) },
		func() error { return c.ReadAt(ctx, back, last) },
		func() error { return c.Trim(ctx, last, blockBytes, false) },
		func() error { return c.Flush(ctx) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("%s: %w", uri, err)
		}
	}
	if !bytes.Equal(now, back) {
		return fmt.Errorf("%s: a block reads back differently from what was written", uri)
	}
	fmt.Fprintf(a.stdout, "%s: %d bytes; write, flush, read back and trim are right\n", uri, c.Size())
	return nil
}
