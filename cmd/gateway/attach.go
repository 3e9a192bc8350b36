package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"graindisk/config"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/nbdkernel"
)

type attachOptions struct {
	device         string
	blockSize      int
	reconnectDelay time.Duration
}

func newAttachCmd(a *app) *cobra.Command {
	o := attachOptions{}
	cmd := &cobra.Command{
		Use:   "attach DISK|URI",
		Short: "Make a disk a block device of this host, /dev/nbdN, by the kernel's NBD client",
		Long: `Attach connects to the disk DISK of the gateway in the configuration, on its first plain unix socket, or
to an NBD URI, and hands the connection to the kernel. It prints the device once it is there and stays
in the foreground: when the connection ends, it connects again and gives the kernel the new one;
meanwhile requests wait, for as long as --reconnect-delay. SIGTERM and SIGINT detach the device, as
"gateway detach" does; unmount it first. It needs root and the kernel's module: modprobe nbd.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runAttach(cmd.Context(), a, args[0], o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.device, "device", "", "device, such as /dev/nbd3 (default the first that is free)")
	f.IntVar(&o.blockSize, "block-size", 512, "logical block size in bytes: 512, 1024, 2048 or 4096")
	f.DurationVar(&o.reconnectDelay, "reconnect-delay", 5*time.Minute, "how long requests wait for a gateway that is away before they fail")
	return cmd
}

func newDetachCmd(*app) *cobra.Command {
	return &cobra.Command{
		Use:   "detach DEVICE",
		Short: "End a block device that attach has made; unmount it first",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			index, err := deviceIndex(args[0])
			if err != nil {
				return err
			}
			k, err := nbdkernel.Open()
			if err != nil {
				return err
			}
			defer k.Close()
			if err := k.Disconnect(index); err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return nil
		},
	}
}

// deviceIndex is N of /dev/nbdN.
func deviceIndex(device string) (int, error) {
	n, ok := strings.CutPrefix(filepath.Clean(device), "/dev/nbd")
	index, err := strconv.Atoi(n)
	if !ok || err != nil || index < 0 || strconv.Itoa(index) != n {
		return 0, usagef("%q is no device such as /dev/nbd0", device)
	}
	return index, nil
}

// attachURI is where to find what the user named.
func attachURI(a *app, what string) (string, error) {
	if strings.Contains(what, "://") {
		return what, nil
	}
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return "", err
	}
	for _, l := range cfg.Listen.NBD {
		if l.Network() == "unix" && l.TLS != config.TLSRequire {
			return l.URI(what, ""), nil
		}
	}
	return "", fmt.Errorf("no unix socket without TLS is configured in listen.nbd; the kernel's client needs one")
}

func runAttach(ctx context.Context, a *app, what string, o attachOptions) error {
	d := nbdkernel.Device{Index: nbdkernel.AnyDevice, BlockSize: o.blockSize, ReconnectDelay: o.reconnectDelay}
	if o.device != "" {
		var err error
		if d.Index, err = deviceIndex(o.device); err != nil {
			return err
		}
	}
	if b := o.blockSize; b < 512 || b > 4096 || b&(b-1) != 0 {
		return usagef("--block-size %d is none of 512, 1024, 2048 and 4096", b)
	}
	if o.reconnectDelay < time.Second {
		return usagef("--reconnect-delay %v is less than a second", o.reconnectDelay)
	}
	uri, err := attachURI(a, what)
	if err != nil {
		return err
	}
	k, err := nbdkernel.Open()
	if err != nil {
		return err
	}
	defer k.Close()
	sock, info, err := nbdclient.Negotiate(ctx, uri)
	if err != nil {
		return err
	}
	d.Size, d.Flags = info.Size, info.Flags
	if d.Index, err = k.Connect(d, sock); err != nil {
		sock.Close()
		return err
	}
	if a.json {
		err = a.printJSON(map[string]any{"device": fmt.Sprintf("/dev/nbd%d", d.Index), "uri": uri})
	} else {
		_, err = fmt.Fprintf(a.stdout, "attached /dev/nbd%d\n", d.Index)
	}
	if err == nil {
		err = keepAttached(ctx, a, k, d, uri, sock)
	}
	if errors.Is(err, nbdkernel.ErrDetached) {
		return nil
	}
	derr := k.Disconnect(d.Index)
	if errors.Is(derr, nbdkernel.ErrDetached) {
		derr = nil
	}
	return errors.Join(err, derr)
}

// keepAttached gives the kernel a new connection whenever the last one has ended. It returns nil once
// ctx ends, and nbdkernel.ErrDetached when somebody has detached the device. It owns sock.
func keepAttached(ctx context.Context, a *app, k *nbdkernel.Conn, d nbdkernel.Device, uri string, sock net.Conn) error {
	log := newLogger(a, false).With("device", fmt.Sprintf("/dev/nbd%d", d.Index))
	for {
		gone, err := nbdkernel.WaitHangup(sock, ctx.Done())
		sock.Close()
		if err != nil || !gone {
			return err
		}
		told := ""
		for {
			sock, err = reconnect(ctx, k, d, uri)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, nbdkernel.ErrDetached) {
				return err
			}
			if told != err.Error() {
				told = err.Error()
				log.Warn("connection lost; trying again", "err", err)
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(reconnectRetry):
			}
		}
		log.Info("connected again")
	}
}

const reconnectRetry = 50 * time.Millisecond

// reconnect makes one try, which is over after a while: a gateway that is being replaced lets wait.
func reconnect(ctx context.Context, k *nbdkernel.Conn, d nbdkernel.Device, uri string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	sock, info, err := nbdclient.Negotiate(ctx, uri)
	if err != nil {
		return nil, err
	}
	if info.Size != d.Size || info.Flags != d.Flags {
		sock.Close()
		return nil, fmt.Errorf("the disk is another now: %d bytes, flags %#x; it had %d, %#x", info.Size, info.Flags, d.Size, d.Flags)
	}
	for { // the kernel may see the end of the old connection later than we do
		err = k.Reconnect(d.Index, sock)
		if !errors.Is(err, unix.ENOSPC) || ctx.Err() != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		sock.Close()
		return nil, err
	}
	return sock, nil
}
