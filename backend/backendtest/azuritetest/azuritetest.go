// Package azuritetest runs a real Azurite server, Azure's own emulator of its blob storage, for a test. It is
// installed once by test/azure/install.sh (`make azurite`); a test that needs it fails without.
package azuritetest

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"

	"graindisk/backend/azure"
	"graindisk/backend/backendtest/servertest"
)

// Version is Azurite's, as pinned in test/azure/package.json.
const Version = "3.37.0"

// The emulator's only account, and its key, which its documentation publishes.
const (
	Account    = "devstoreaccount1"
	AccountKey = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)

// Server is one Azurite. Its methods must be called by one goroutine at a time, Store and Endpoint
// excepted.
type Server struct {
	servertest.Process
	Endpoint string // "http://127.0.0.1:port/account"; the same for the server's whole life

	containers atomic.Int64
}

// Start starts a server that stops when the test ends. If the test fails, the end of the server's
// log is in the test's.
func Start(t testing.TB) *Server {
	t.Helper()
	main, dir := findMain(t), t.TempDir()
	// Without credentials it says 400 or 403 once it serves.
	s := &Server{Process: servertest.Process{Name: "Azurite", Ready: "/" + Account + "?comp=list", Want: http.StatusForbidden}}
	s.Command = func(address string) *exec.Cmd {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("node", main, "--blobHost", host, "--blobPort", port, "--inMemoryPersistence", "--silent", "--disableTelemetry")
		cmd.Env = []string{"HOME=" + dir, "PATH=" + os.Getenv("PATH")}
		return cmd
	}
	s.Run(t)
	s.Endpoint = "http://" + s.Address + "/" + Account
	return s
}

// findMain is the path of the server's main program: GRAINDISK_AZURITE, or where install.sh puts it.
func findMain(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("node"); err != nil {
		t.Fatal("no Node.js for Azurite: install Node.js 20 or newer")
	}
	path := os.Getenv("GRAINDISK_AZURITE")
	if path == "" {
		cache, err := os.UserCacheDir() // XDG_CACHE_HOME or ~/.cache
		if err != nil {
			t.Fatal(err)
		}
		path = filepath.Join(cache, "graindisk", "azurite-"+Version, "node_modules", "azurite", "dist", "src", "blob", "main.js")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no Azurite server for this test (%v): run `make azurite`", err)
	}
	return path
}

// Container makes a new, empty container and returns its name.
func (s *Server) Container(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("container-%d", s.containers.Add(1))
	if _, err := s.Client(t, name).Create(t.Context(), nil); err != nil {
		t.Fatalf("make container %s: %v", name, err)
	}
	return name
}

// Client is the SDK's own client of a container, for what the driver does not do.
func (s *Server) Client(t testing.TB, name string) *container.Client {
	t.Helper()
	key, err := container.NewSharedKeyCredential(Account, AccountKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := container.NewClientWithSharedKeyCredential(s.Endpoint+"/"+name, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// SAS makes a signature for a container that allows what may says and ends after some time, which may be past.
func (s *Server) SAS(t testing.TB, name string, may sas.ContainerPermissions, ends time.Duration) string {
	t.Helper()
	key, err := container.NewSharedKeyCredential(Account, AccountKey)
	if err != nil {
		t.Fatal(err)
	}
	q, err := sas.BlobSignatureValues{
		Protocol: sas.ProtocolHTTPSandHTTP, ContainerName: name, StartTime: time.Now().Add(-2 * time.Hour), ExpiryTime: time.Now().Add(ends),
		Permissions: may.String(),
	}.SignWithSharedKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return q.Encode()
}

// Options are those of the azure driver for a container of this server.
func (s *Server) Options(name, prefix string) azure.Options {
	return azure.Options{Account: Account, Container: name, Prefix: prefix, Endpoint: s.Endpoint, Credentials: azure.Credentials{AccountKey: AccountKey}}
}

// Store opens a container of this server.
func (s *Server) Store(t testing.TB, name, prefix string) *azure.Store {
	t.Helper()
	store, err := azure.Open(s.Options(name, prefix))
	if err != nil {
		t.Fatal(err)
	}
	return store
}
