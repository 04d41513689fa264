// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IDepositCollector, IPaymentChannels as Channels} from "../src/IPaymentChannels.sol";
import {ISignatureTransfer} from "../src/Permit2.sol";
import {ChannelsBase} from "./ChannelsBase.sol";
import {Wallet} from "./mocks/Wallets.sol";
import {vm} from "./Vm.sol";

interface ICollectorErrors {
    error OnlyChannels(address caller);
    error ERC3009InvalidSignature();
    error ERC3009UsedAuthorization(address authorizer, bytes32 nonce);
}

/// @notice Deposits by signature: each is good for one channel, once, and for nobody else.
contract CollectorsTest is ChannelsBase {
    function setUp() public override {
        super.setUp();
        vm.prank(buyer);
        token.approve(PERMIT2, type(uint256).max);
    }

    // -------------------------------------------------------------------------------- EIP-3009

    function test_depositByAuthorization() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = channelOf(c);
        bytes memory data = authorized(BUYER_KEY, collector3009, id, 100, 7);
        vm.prank(stranger);
        channels.deposit(c, 100, collector3009, data);
        checkChannel(id, 100, 0);
        vm.assertEq(token.balanceOf(buyer), 1_000_000 - 100, "paid by the payer");
        vm.expectPartialRevert(ICollectorErrors.ERC3009UsedAuthorization.selector);
        channels.deposit(c, 100, collector3009, data);
        channels.deposit(c, 100, collector3009, authorized(BUYER_KEY, collector3009, id, 100, 8));
        checkChannel(id, 200, 0);
    }

    function test_anAuthorizationIsGoodForOneChannelAndAmount() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes memory data = authorized(BUYER_KEY, collector3009, channelOf(c), 100, 7);
        Channels.ChannelConfig memory other = someConfig();
        other.receiver = stranger;
        vm.expectPartialRevert(ICollectorErrors.ERC3009InvalidSignature.selector);
        channels.deposit(other, 100, collector3009, data);
        vm.expectPartialRevert(ICollectorErrors.ERC3009InvalidSignature.selector);
        channels.deposit(c, 101, collector3009, data);
        vm.expectPartialRevert(ICollectorErrors.ERC3009InvalidSignature.selector);
        channels.deposit(c, 99, collector3009, data);
        c.payer = stranger;
        vm.expectPartialRevert(ICollectorErrors.ERC3009InvalidSignature.selector);
        channels.deposit(c, 100, collector3009, data);
    }

    function test_nobodyButTheChannelsMayCollect() public {
        bytes32 id = channelOf(someConfig());
        bytes memory data = authorized(BUYER_KEY, collector3009, id, 100, 7);
        address[2] memory both = [collector3009, collectorPermit2];
        for (uint256 i = 0; i < 2; ++i) {
            vm.expectRevert(abi.encodeWithSelector(ICollectorErrors.OnlyChannels.selector, stranger));
            vm.prank(stranger);
            IDepositCollector(both[i]).collect(buyer, address(token), 100, id, data);
        }
        vm.assertEq(token.balanceOf(buyer), 1_000_000, "untouched");
    }

    // --------------------------------------------------------------------------------- Permit2

    function permitted(uint256 key, uint256 amount, uint256 nonce, uint256 deadline, bytes32 id)
        private
        view
        returns (bytes memory)
    {
        bytes32 hash = witnessHash(collectorPermit2, address(token), amount, nonce, deadline, id);
        return abi.encode(nonce, deadline, sign(key, permit2Digest(hash)), bytes(""));
    }

    function test_depositByPermit2() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = channelOf(c);
        bytes memory data = permitted(BUYER_KEY, 100, 300, START, id);
        vm.prank(stranger);
        channels.deposit(c, 100, collectorPermit2, data);
        checkChannel(id, 100, 0);
        vm.assertEq(ISignatureTransfer(PERMIT2).nonceBitmap(buyer, 1), 1 << 44, "nonce 300 is used");
        vm.expectRevert(ISignatureTransfer.InvalidNonce.selector);
        channels.deposit(c, 100, collectorPermit2, data);
    }

    function test_permit2SignaturesAreGoodForWhatTheySay() public {
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = channelOf(c);
        bytes memory data = permitted(BUYER_KEY, 100, 1, START, id);
        vm.expectRevert(ISignatureTransfer.InvalidSigner.selector);
        channels.deposit(c, 99, collectorPermit2, data);
        Channels.ChannelConfig memory other = someConfig();
        other.salt = bytes32(uint256(9));
        vm.expectRevert(ISignatureTransfer.InvalidSigner.selector);
        channels.deposit(other, 100, collectorPermit2, data);
        vm.expectRevert(ISignatureTransfer.InvalidSigner.selector);
        channels.deposit(c, 100, collectorPermit2, permitted(STRANGER_KEY, 100, 1, START, id));
        vm.warp(START + 1);
        vm.expectRevert(abi.encodeWithSelector(ISignatureTransfer.SignatureExpired.selector, START));
        channels.deposit(c, 100, collectorPermit2, data);
    }

    function test_permit2NeedsNoAllowanceWithAPermit() public {
        vm.prank(buyer);
        token.approve(PERMIT2, 0);
        Channels.ChannelConfig memory c = someConfig();
        bytes32 id = channelOf(c);
        bytes32 hash = witnessHash(collectorPermit2, address(token), 100, 5, START, id);
        bytes memory permit = permitSigned(BUYER_KEY, PERMIT2, 100, START);
        bytes memory data = abi.encode(5, START, sign(BUYER_KEY, permit2Digest(hash)), permit);
        (uint256 value, uint256 deadline, uint8 v, bytes32 r, bytes32 s) =
            abi.decode(permit, (uint256, uint256, uint8, bytes32, bytes32));
        (bool done,) = address(token)
            .call(
                abi.encodeWithSignature(
                    "permit(address,address,uint256,uint256,uint8,bytes32,bytes32)",
                    buyer,
                    PERMIT2,
                    value,
                    deadline,
                    v,
                    r,
                    s
                )
            );
        vm.assertTrue(done, "somebody sends the permit first");
        channels.deposit(c, 100, collectorPermit2, data);
        checkChannel(id, 100, 0);
    }

    function plainPermit(uint256 amount, uint256 nonce)
        private
        view
        returns (ISignatureTransfer.PermitTransferFrom memory permit, bytes32 digest)
    {
        permit = ISignatureTransfer.PermitTransferFrom(
            ISignatureTransfer.TokenPermissions(address(token), amount), nonce, START
        );
        digest = permit2Digest(
            keccak256(
                abi.encode(
                    keccak256(
                        "PermitTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline)TokenPermissions(address token,uint256 amount)"
                    ),
                    keccak256(
                        abi.encode(
                            keccak256("TokenPermissions(address token,uint256 amount)"), address(token), amount
                        )
                    ),
                    address(this),
                    nonce,
                    START
                )
            )
        );
    }

    function test_permit2WithoutAWitness() public {
        ISignatureTransfer p = ISignatureTransfer(PERMIT2);
        (ISignatureTransfer.PermitTransferFrom memory permit, bytes32 digest) = plainPermit(100, 3);
        ISignatureTransfer.SignatureTransferDetails memory details =
            ISignatureTransfer.SignatureTransferDetails(arbiter, 101);
        bytes memory signature = sign(BUYER_KEY, digest);
        vm.expectRevert(abi.encodeWithSelector(ISignatureTransfer.InvalidAmount.selector, 100));
        p.permitTransferFrom(permit, details, buyer, signature);
        details.requestedAmount = 60;
        vm.expectRevert(ISignatureTransfer.InvalidSigner.selector);
        vm.prank(stranger); // The signature names the caller.
        p.permitTransferFrom(permit, details, buyer, signature);
        vm.expectRevert(ISignatureTransfer.InvalidSignatureLength.selector);
        p.permitTransferFrom(permit, details, buyer, hex"00");
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(BUYER_KEY, digest);
        bytes memory compact = abi.encodePacked(r, bytes32(uint256(s) | (uint256(v - 27) << 255)));
        p.permitTransferFrom(permit, details, buyer, compact);
        vm.assertEq(token.balanceOf(arbiter), 60, "moved");
        vm.expectRevert(ISignatureTransfer.InvalidNonce.selector);
        p.permitTransferFrom(permit, details, buyer, signature);
    }

    function test_permit2NoncesCanBeGivenUp() public {
        (ISignatureTransfer.PermitTransferFrom memory permit, bytes32 digest) = plainPermit(100, 3);
        vm.prank(buyer);
        ISignatureTransfer(PERMIT2).invalidateUnorderedNonces(0, 1 << 3);
        bytes memory signature = sign(BUYER_KEY, digest);
        vm.expectRevert(ISignatureTransfer.InvalidNonce.selector);
        ISignatureTransfer(PERMIT2)
            .permitTransferFrom(permit, ISignatureTransfer.SignatureTransferDetails(arbiter, 1), buyer, signature);
    }

    function test_permit2AsksWalletsThemselves() public {
        Wallet wallet = new Wallet(buyer);
        vm.prank(buyer);
        token.transfer(address(wallet), 100);
        wallet.call(address(token), abi.encodeCall(token.approve, (PERMIT2, 100)));
        (ISignatureTransfer.PermitTransferFrom memory permit, bytes32 digest) = plainPermit(100, 3);
        bytes memory signature = sign(BUYER_KEY, digest);
        ISignatureTransfer.SignatureTransferDetails memory details =
            ISignatureTransfer.SignatureTransferDetails(arbiter, 50);
        wallet.revoke();
        vm.expectRevert(ISignatureTransfer.InvalidContractSignature.selector);
        ISignatureTransfer(PERMIT2).permitTransferFrom(permit, details, address(wallet), signature);
        wallet = new Wallet(buyer);
        vm.prank(buyer);
        token.transfer(address(wallet), 100);
        wallet.call(address(token), abi.encodeCall(token.approve, (PERMIT2, 100)));
        ISignatureTransfer(PERMIT2).permitTransferFrom(permit, details, address(wallet), signature);
        vm.assertEq(token.balanceOf(arbiter), 50, "moved");
    }
}

interface IMulticall3 {
    struct Call {
        address target;
        bytes callData;
    }

    struct Call3 {
        address target;
        bool allowFailure;
        bytes callData;
    }

    struct Result {
        bool success;
        bytes returnData;
    }

    function aggregate(Call[] calldata calls) external payable returns (uint256, bytes[] memory);
    function tryAggregate(bool requireSuccess, Call[] calldata calls) external payable returns (Result[] memory);
    function aggregate3(Call3[] calldata calls) external payable returns (Result[] memory);
    function getBlockNumber() external view returns (uint256);
    function getChainId() external view returns (uint256);
    function getCurrentBlockTimestamp() external view returns (uint256);
    function getEthBalance(address) external view returns (uint256);
}

/// @notice Several reads at one block, of which some may fail.
contract Multicall3Test is ChannelsBase {
    IMulticall3 private _many;

    function setUp() public override {
        super.setUp();
        _many = IMulticall3(create("Multicall3", ""));
    }

    function calls() private view returns (IMulticall3.Call[] memory list) {
        list = new IMulticall3.Call[](2);
        list[0] = IMulticall3.Call(address(token), abi.encodeCall(token.balanceOf, (buyer)));
        list[1] = IMulticall3.Call(address(token), hex"deadbeef");
    }

    function test_someMayFail() public {
        IMulticall3.Result[] memory results = _many.tryAggregate(false, calls());
        vm.assertTrue(results[0].success && !results[1].success, "one of two");
        vm.assertEq(abi.decode(results[0].returnData, (uint256)), 1_000_000, "balance");
        IMulticall3.Call3[] memory three = new IMulticall3.Call3[](2);
        for (uint256 i = 0; i < 2; ++i) {
            three[i] = IMulticall3.Call3(calls()[i].target, i == 1, calls()[i].callData);
        }
        results = _many.aggregate3(three);
        vm.assertTrue(results[0].success && !results[1].success, "one of two");
        three[1].allowFailure = false;
        vm.expectRevert("Multicall3: call failed");
        _many.aggregate3(three);
    }

    function test_noneMayFail() public {
        IMulticall3.Call[] memory list = calls();
        vm.expectRevert("Multicall3: call failed");
        _many.tryAggregate(true, list);
        vm.expectRevert("Multicall3: call failed");
        _many.aggregate(list);
        list[1] = list[0];
        (uint256 number, bytes[] memory data) = _many.aggregate(list);
        vm.assertEq(number, block.number, "block");
        vm.assertEq(abi.decode(data[1], (uint256)), 1_000_000, "balance");
    }

    function test_theBlock() public {
        vm.assertEq(_many.getBlockNumber(), block.number, "number");
        vm.assertEq(_many.getCurrentBlockTimestamp(), START, "time");
        vm.assertEq(_many.getChainId(), block.chainid, "chain");
        vm.deal(stranger, 7);
        vm.assertEq(_many.getEthBalance(stranger), 7, "coin");
    }
}
