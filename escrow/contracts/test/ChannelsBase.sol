// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";

import {IPaymentChannels} from "../src/IPaymentChannels.sol";
import {Base} from "./Base.sol";
import {PlainCollector} from "./mocks/Collectors.sol";
import {vm} from "./Vm.sol";

/// @notice Channels between the buyer, who pays, and the seller; digests written out anew.
abstract contract ChannelsBase is Base {
    uint40 internal constant DELAY = 900;
    address internal constant PERMIT2 = 0x000000000022D473030F116dDEE9F6B43aC78BA3;

    IPaymentChannels internal channels;
    PlainCollector internal plain;
    address internal collector3009;
    address internal collectorPermit2;

    function setUp() public virtual override {
        super.setUp();
        channels = IPaymentChannels(create("PaymentChannels", ""));
        collector3009 = create("ERC3009Collector", abi.encode(address(channels)));
        collectorPermit2 = create("Permit2Collector", abi.encode(address(channels)));
        vm.etch(PERMIT2, runtimeCode("Permit2"));
        plain = new PlainCollector();
        useCollector(buyer);
        useCollector(stranger);
        vm.label(address(channels), "channels");
    }

    function useCollector(address from) internal {
        vm.prank(from);
        token.approve(address(plain), type(uint256).max);
    }

    function runtimeCode(string memory name) internal view returns (bytes memory) {
        return vm.parseJsonBytes(
            vm.readFile(string.concat("artifacts/", name, ".json")), ".deployedBytecode"
        );
    }

    function someConfig() internal view returns (IPaymentChannels.ChannelConfig memory) {
        return IPaymentChannels.ChannelConfig(buyer, buyer, seller, seller, address(token), DELAY, bytes32(0));
    }

    // --------------------------------------------------------------------------------- digests

    function channelsDigest(bytes32 structHash) internal view returns (bytes32) {
        bytes32 separator = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256("x402 Batch Settlement"),
                keccak256("1"),
                block.chainid,
                address(channels)
            )
        );
        return keccak256(abi.encodePacked(hex"1901", separator, structHash));
    }

    function channelOf(IPaymentChannels.ChannelConfig memory c) internal view returns (bytes32) {
        return channelsDigest(
            keccak256(
                abi.encode(
                    keccak256(
                        "ChannelConfig(address payer,address payerAuthorizer,address receiver,address receiverAuthorizer,address token,uint40 withdrawDelay,bytes32 salt)"
                    ),
                    c.payer,
                    c.payerAuthorizer,
                    c.receiver,
                    c.receiverAuthorizer,
                    c.token,
                    c.withdrawDelay,
                    c.salt
                )
            )
        );
    }

    function voucherDigest(bytes32 id, uint128 most) internal view returns (bytes32) {
        return channelsDigest(
            keccak256(abi.encode(keccak256("Voucher(bytes32 channelId,uint128 maxClaimableAmount)"), id, most))
        );
    }

    function refundDigest(bytes32 id, uint256 nonce, uint128 amount) internal view returns (bytes32) {
        return channelsDigest(
            keccak256(
                abi.encode(keccak256("Refund(bytes32 channelId,uint256 nonce,uint128 amount)"), id, nonce, amount)
            )
        );
    }

    function batchDigest(IPaymentChannels.VoucherClaim[] memory rows) internal view returns (bytes32) {
        bytes memory entries;
        for (uint256 i = 0; i < rows.length; ++i) {
            entries = bytes.concat(
                entries,
                keccak256(
                    abi.encode(
                        keccak256(
                            "ClaimEntry(bytes32 channelId,uint128 maxClaimableAmount,uint128 totalClaimed)"
                        ),
                        channelOf(rows[i].voucher.channel),
                        rows[i].voucher.maxClaimableAmount,
                        rows[i].totalClaimed
                    )
                )
            );
        }
        return channelsDigest(
            keccak256(
                abi.encode(
                    keccak256(
                        "ClaimBatch(ClaimEntry[] claims)ClaimEntry(bytes32 channelId,uint128 maxClaimableAmount,uint128 totalClaimed)"
                    ),
                    keccak256(entries)
                )
            )
        );
    }

    // ----------------------------------------------------------------------------------- moves

    function voucher(IPaymentChannels.ChannelConfig memory c, uint256 key, uint128 most, uint128 total)
        internal
        view
        returns (IPaymentChannels.VoucherClaim memory)
    {
        bytes memory signature = sign(key, voucherDigest(channelOf(c), most));
        return IPaymentChannels.VoucherClaim(IPaymentChannels.Voucher(c, most), signature, total);
    }

    function one(IPaymentChannels.VoucherClaim memory row)
        internal
        pure
        returns (IPaymentChannels.VoucherClaim[] memory rows)
    {
        rows = new IPaymentChannels.VoucherClaim[](1);
        rows[0] = row;
    }

    function depositPlain(IPaymentChannels.ChannelConfig memory c, uint128 amount) internal returns (bytes32 id) {
        channels.deposit(c, amount, address(plain), "");
        return channelOf(c);
    }

    function claimAs(address who, IPaymentChannels.VoucherClaim memory row) internal {
        vm.prank(who);
        channels.claim(one(row));
    }

    /// @dev `collectorData` of the EIP-3009 collector, signed by `key` for `to`.
    function authorized(uint256 key, address to, bytes32 id, uint256 amount, uint256 salt)
        internal
        view
        returns (bytes memory)
    {
        uint256 validBefore = block.timestamp + 600;
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256(
                    "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
                ),
                vm.addr(key),
                to,
                amount,
                0,
                validBefore,
                keccak256(abi.encode(id, salt))
            )
        );
        return abi.encode(0, validBefore, salt, sign(key, tokenDigest(structHash)));
    }

    /// @dev The struct hash of a Permit2 transfer with the collectors' witness.
    function witnessHash(address spender, address token_, uint256 amount, uint256 nonce, uint256 deadline, bytes32 id)
        internal
        pure
        returns (bytes32)
    {
        return keccak256(
            abi.encode(
                keccak256(
                    "PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline,DepositWitness witness)DepositWitness(bytes32 channelId)TokenPermissions(address token,uint256 amount)"
                ),
                keccak256(abi.encode(keccak256("TokenPermissions(address token,uint256 amount)"), token_, amount)),
                spender,
                nonce,
                deadline,
                keccak256(abi.encode(keccak256("DepositWitness(bytes32 channelId)"), id))
            )
        );
    }

    function permit2Digest(bytes32 structHash) internal view returns (bytes32) {
        bytes32 separator = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,uint256 chainId,address verifyingContract)"),
                keccak256("Permit2"),
                block.chainid,
                PERMIT2
            )
        );
        return keccak256(abi.encodePacked(hex"1901", separator, structHash));
    }

    function checkChannel(bytes32 id, uint256 balance, uint256 claimed) internal view {
        (uint128 held, uint128 total) = channels.channels(id);
        vm.assertEq(uint256(held), balance, "balance");
        vm.assertEq(uint256(total), claimed, "claimed");
    }

    function checkPending(bytes32 id, uint256 amount, uint256 initiatedAt) internal view {
        (uint128 asked, uint40 since) = channels.pendingWithdrawals(id);
        vm.assertEq(uint256(asked), amount, "pending amount");
        vm.assertEq(uint256(since), initiatedAt, "pending since");
    }

    function permitSigned(uint256 key, address spender, uint256 value, uint256 deadline)
        internal
        view
        returns (bytes memory)
    {
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"),
                vm.addr(key),
                spender,
                value,
                IERC20Permit(address(token)).nonces(vm.addr(key)),
                deadline
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, tokenDigest(structHash));
        return abi.encode(value, deadline, v, r, s);
    }
}
